"""What `sow` and `perturb` wrote is fresh in every call; every other variable is carried, whatever its form."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainkit as tk
from tests.helpers.compare import assert_same

X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
TX = optax.sgd(0.1)


def total(old, new):
    return old + new


class Sowing(nn.Module):
    """Sows in all the ways there are; one collection also holds a variable."""

    @nn.compact
    def __call__(self, x):
        calls = self.variable("stats", "calls", jnp.zeros, ())
        if self.is_mutable_collection("stats") and not self.is_initializing():
            calls.value += 1
        h = self.perturb("h", nn.Dense(3)(x))
        self.sow("losses", "aux", (h**2).mean(), reduce_fn=total, init_fn=lambda: jnp.float32(0))
        self.sow("losses", "aux", jnp.float32(1), reduce_fn=total, init_fn=lambda: jnp.float32(0))
        self.sow("stats", "h", h)
        self.sow("intermediates", "last", h, reduce_fn=lambda old, new: new, init_fn=lambda: None)
        return h


class Layer(nn.Module):
    @nn.compact
    def __call__(self, h, _):
        h = nn.tanh(nn.Dense(3)(h))
        self.sow("losses", "aux", (h**2).mean(), reduce_fn=total, init_fn=lambda: jnp.float32(0))
        return h, None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            Layer, variable_axes={"params": 0, "losses": 0}, split_rngs={"params": True}, length=3
        )
        return layers(name="layers")(x, None)[0]


class AuxTrainer(tk.Trainer):
    """The loss reads back what was sown, and predictions are what it read."""

    def loss(self, model, batch, ctx):
        y = model(batch["x"])
        aux = sum(leaf.sum() for leaf in jax.tree.leaves(model.variables["losses"]))
        return (y**2).mean(-1) + aux, {}

    def predict_step(self, model, batch, ctx):
        y = model(batch["x"])
        aux = sum(leaf.sum() for leaf in jax.tree.leaves(model.variables["losses"]))
        return jnp.broadcast_to(aux, (len(y),))


@pytest.mark.parametrize("model", [Sowing(), Scanned()], ids=["plain", "scanned"])
def test_what_is_sown_is_fresh_in_training_evaluation_and_prediction(model):
    trainer = AuxTrainer(model, TX)
    state = jax.device_get(trainer.init({"x": X}))
    assert {"losses", "perturbations", "intermediates"}.isdisjoint(state.collections)
    stats = {"stats": {"calls": np.float32(0)}} if isinstance(model, Sowing) else {}

    def losses(params):
        y, updated = model.apply({"params": params, **stats}, X, mutable=["losses"])
        aux = sum(leaf.sum() for leaf in jax.tree.leaves(updated["losses"]))
        return ((y**2).mean(-1) + aux).mean(), aux

    params = state.params
    for _ in range(3):
        grads, _ = jax.jit(jax.grad(losses, has_aux=True))(params)
        params = jax.tree.map(lambda one, by: one - 0.1 * by, params, grads)
    result = trainer.fit([{"x": X}], steps=3)
    assert_same(result.state.params, params, rtol=1e-5, atol=1e-6)
    assert {"losses", "perturbations", "intermediates"}.isdisjoint(result.state.collections)
    loss, aux = losses(params)
    for _ in range(2):
        assert trainer.evaluate([{"x": X}])["loss"] == pytest.approx(float(loss), rel=1e-5)
        np.testing.assert_allclose(trainer.predict([{"x": X}]), np.full(4, aux), rtol=1e-5)


def test_a_collection_that_is_sown_into_keeps_its_variables():
    trainer = AuxTrainer(Sowing(), TX)
    result = trainer.fit([{"x": X}], steps=3)
    assert_same(jax.device_get(result.state.collections), {"stats": {"calls": np.float32(3)}})
    trainer.evaluate([{"x": X}])
    assert float(trainer.state.collections["stats"]["calls"]) == 3


def test_sown_values_in_a_state_made_by_hand_are_neither_read_nor_changed():
    variables = Sowing().init(jax.random.key(0), X)
    state = tk.TrainState.from_variables(
        apply_fn=Sowing().apply, variables=variables, tx=TX, rng=jax.random.key(1)
    )
    trainer, fresh = AuxTrainer(Sowing(), TX), AuxTrainer(Sowing(), TX)
    trainer.state = state
    fresh.state = state.replace(collections={"stats": {"calls": jnp.zeros(())}})
    got, expected = (one.fit([{"x": X}], steps=2).state for one in (trainer, fresh))
    assert_same(got.params, expected.params)
    assert_same(got.collections["losses"], variables["losses"])
    assert float(got.collections["stats"]["calls"]) == 2


class Carrying(nn.Module):
    """An LSTM that goes on where the batch before ended, with batch statistics and a list beside it."""

    @nn.compact
    def __call__(self, x, train):
        cell = nn.LSTMCell(3)
        carry = self.variable("memory", "carry", lambda: (jnp.zeros((len(x), 3)), jnp.zeros((len(x), 3))))
        seen = self.variable("memory", "seen", lambda: [jnp.zeros(()), {"last": jnp.zeros((3,))}])
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        after, y = cell(carry.value, x)
        if self.is_mutable_collection("memory") and not self.is_initializing():
            carry.value = after
            seen.value = [seen.value[0] + 1, {"last": y[-1]}]
        return y


class CarryTrainer(tk.Trainer):
    def loss(self, model, batch, ctx):
        return (model(batch["x"], ctx.train) ** 2).mean(-1), {}


def test_tuples_and_lists_in_variables_are_carried_as_by_hand():
    trainer = CarryTrainer(Carrying(), TX)
    state = jax.device_get(trainer.init({"x": X}))
    assert set(state.collections) == {"memory"}
    variables = state.variables

    @jax.jit
    def step(variables):
        def loss(params):
            y, updated = Carrying().apply(
                {**variables, "params": params}, X, True, mutable=["memory", "batch_stats"]
            )
            return (y**2).mean(), updated

        grads, updated = jax.grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda one, by: one - 0.1 * by, variables["params"], grads)
        return {"params": params, **updated}

    for _ in range(4):
        variables = step(variables)
    result = trainer.fit([{"x": X}], steps=4)
    assert_same(result.state.variables, variables, rtol=1e-5, atol=1e-6)
    assert float(result.state.collections["memory"]["seen"][0]) == 4


def test_a_carried_tuple_is_saved_and_resumed(tmp_path):
    def trainer(logdir):
        keep = tk.callbacks.Checkpoint(every=tk.Every(steps=2))
        return CarryTrainer(Carrying(), TX, logdir=logdir, callbacks=[keep], steps_per_call=1)

    whole = trainer(tmp_path / "whole").fit([{"x": X}], steps=4)
    trainer(tmp_path / "parts").fit([{"x": X}], steps=2)
    resumed = trainer(tmp_path / "parts").fit([{"x": X}], steps=4, resume=True)
    assert_same(resumed.state.variables, whole.state.variables)
    again = trainer(None)
    again.init({"x": X})
    again.restore(tmp_path / "parts")
    assert_same(again.state.variables, whole.state.variables)
