"""Models with state, against the loop that splits and joins the variables by hand."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import trainkit as tk
from tests.helpers.compare import assert_same
from tests.helpers.guides import keys, load, recorded

guide = load("params_and_state")


@pytest.fixture(autouse=True)
def _ranks_may_differ():
    # The layer adds a mean [features] to one [1, features].
    with jax.numpy_rank_promotion("allow"):
        yield


def by_hand(model, tx, data, steps):
    variables = dict(jax.jit(model.init)(keys()[0], data["x"]))
    params = variables.pop("params")
    state, opt_state = variables, tx.init(params)

    @jax.jit
    def step(params, opt_state, state, batch):
        def loss(params):
            y, updated = model.apply({"params": params, **state}, batch["x"], mutable=list(state))
            return ((y - batch["y"]) ** 2).sum(), updated

        (value, updated), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, updated, value

    for _ in range(steps):
        params, opt_state, state, value = step(params, opt_state, state, data)
        yield params, opt_state, state, value


@pytest.fixture(scope="module")
def ran():
    with jax.numpy_rank_promotion("allow"):
        return recorded(guide.main)


CASES = {
    "running mean": (guide.BiasAdderWithRunningMean(), optax.sgd(0.02)),
    "three collections": (guide.Tracked(), optax.adam(0.02)),
}


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_that_of_the_loop_by_hand(case, ran, check):
    record = dict(zip(CASES, ran[2], strict=True))[case]
    check(record, list(by_hand(*CASES[case], guide.samples(), 100)))


def test_a_shape_that_settles_at_the_first_step_is_announced_once(caplog):
    data, decay = guide.samples(), 0.9
    trainer = guide.SumOfSquares(
        guide.BiasAdderWithRunningMean(), optax.sgd(0.02), callbacks=[tk.callbacks.EMA(decay)]
    )
    assert trainer.init(data).batch_stats["mean"].shape == (4,)
    for _ in range(3):
        trainer.fit([data], steps=2)
        trainer.evaluate([data])
    (notice,) = [r.getMessage() for r in caplog.records if "training step" in r.getMessage()]
    assert "state/batch_stats/mean: float32[4] -> float32[1, 4]" in notice
    average = np.zeros((1, 4))
    for _, _, state, _ in by_hand(guide.BiasAdderWithRunningMean(), optax.sgd(0.02), data, 6):
        average = decay * average + (1 - decay) * np.asarray(state["batch_stats"]["mean"])
    np.testing.assert_allclose(trainer.state.hooks["ema"].batch_stats["mean"], average, rtol=1e-5)


class OwnStep(guide.SumOfSquares):
    def train_step(self, state, batch):
        def loss(params):
            variables = {"params": params, **state.model_state}
            y, updated = state.apply_fn(variables, batch["x"], mutable=list(state.model_state))
            return ((y - batch["y"]) ** 2).sum(), updated

        (value, updated), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, model_state=updated), {"loss": value}


def test_a_train_step_of_ones_own_may_settle_a_shape_too():
    data, model, tx = guide.samples(), guide.BiasAdderWithRunningMean(), optax.sgd(0.02)
    state = OwnStep(model, tx).fit([data], steps=5).state
    *_, (params, _, model_state, _) = by_hand(model, tx, data, 5)
    assert_same((state.params, state.model_state), (params, model_state))


class Growing(OwnStep):
    def train_step(self, state, batch):
        state, outputs = super().train_step(state, batch)
        return state.replace(batch_stats={"mean": state.batch_stats["mean"][None]}), outputs


def test_a_state_that_changes_at_every_step_is_refused():
    with pytest.raises(ValueError, match=r"another structure.*batch_stats/mean: float32\[4\]"):
        Growing(guide.BiasAdderWithRunningMean(), optax.sgd(0.02)).fit([guide.samples()], steps=1)


class AlwaysWrites(nn.Module):
    @nn.compact
    def __call__(self, x):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[1:])
        mean.value = x.mean(axis=0)
        return nn.Dense(4)(x - mean.value)


def test_a_layer_that_writes_in_evaluation_is_told_how_not_to():
    trainer = guide.SumOfSquares(AlwaysWrites(), optax.sgd(0.02))
    trainer.fit([guide.samples()], steps=1)
    with pytest.raises(flax.errors.ModifyScopeVariableError) as caught:
        trainer.evaluate([guide.samples()])
    assert any("is_mutable_collection" in note for note in caught.value.__notes__)


def test_the_optimizer_sees_params_only(ran):
    (_, state), _, (_, record) = ran
    data, (_, _, first) = guide.samples(), record.trees[0]
    assert sorted(state.model_state) == ["constants", "counters", "ranges"]
    assert_same(state.collections["constants"], first["constants"])
    rotation = np.asarray(state.collections["constants"]["mix"])
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(4), atol=1e-6)
    assert jax.tree.structure(state.opt_state[0].mu) == jax.tree.structure(state.params)
    assert int(state.collections["counters"]["examples"]) == 100 * len(data["x"])
    assert float(state.collections["ranges"]["largest"]) == np.abs(data["x"]).max()
