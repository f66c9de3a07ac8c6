"""Variables replaced between steps and between fits, against the same done in a loop by hand."""

import functools
import logging

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers.compare import assert_same
from tests.helpers.guides import keys, load, recorded

guide = load("variables_by_hand")


def by_hand(old, new):
    model = guide.Net()
    variables = jax.jit(functools.partial(model.init, train=True))(keys()[0], old["x"])
    params, stats = variables["params"], variables["batch_stats"]

    def make_step(tx):
        @jax.jit
        def step(params, opt_state, stats, batch):
            def loss(params):
                y, updated = model.apply(
                    {"params": params, "batch_stats": stats}, batch["x"], train=True, mutable=["batch_stats"]
                )
                return optax.l2_loss(y, batch["y"]).mean(axis=-1).mean(), updated["batch_stats"]

            (value, updated), grads = jax.value_and_grad(loss, has_aux=True)(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, updated, value

        return step

    tx = optax.adam(1e-2)
    step, opt_state = make_step(tx), tx.init(params)
    for number in range(1, 21):
        params, opt_state, stats, value = step(params, opt_state, stats, old)
        if number == 10:
            stats = {"norm": {"mean": jnp.zeros(8), "var": jnp.ones(8)}}
        yield params, opt_state, {"batch_stats": stats}, value

    params = {**params, "head": jax.tree.map(jnp.zeros_like, params["head"])}
    labels = {"body": "frozen", "norm": "frozen", "head": "free"}
    tx = optax.multi_transform({"free": optax.adam(1e-2), "frozen": optax.set_to_zero()}, labels)
    step, opt_state = make_step(tx), tx.init(params)
    for _ in range(10):
        params, opt_state, stats, value = step(params, opt_state, stats, new)
        yield params, opt_state, {"batch_stats": stats}, value

    tx = optax.adam(1e-3)
    step, opt_state = make_step(tx), tx.init(params)
    for _ in range(10):
        params, opt_state, stats, value = step(params, opt_state, stats, new)
        yield params, opt_state, {"batch_stats": stats}, value


def test_every_step_is_that_of_the_loop_by_hand(check, caplog):
    with caplog.at_level(logging.WARNING, logger="trainkit"):
        state, _, (record,) = recorded(guide.main)
    assert int(state.step) == 40
    check(record, list(by_hand(guide.samples(), guide.samples(seed=1))))
    for part in ("body", "norm"):
        assert_same(record.trees[29][0][part], record.trees[19][0][part])
        assert not np.array_equal(record.trees[39][0][part]["bias"], record.trees[29][0][part]["bias"])
    # Another optimizer is another program: said once, and in a few words.
    (notice,) = [
        r.getMessage() for r in caplog.records if "training step is compiled again" in r.getMessage()
    ]
    assert "opt_state" in notice
    assert notice.endswith(" more")


class Frozen(guide.Regression):
    def init_variables(self, rng, batch):
        return flax.core.freeze(super().init_variables(rng, batch))


def test_frozen_dicts_train_alike():
    data = guide.samples()
    plain = guide.Regression(guide.Net(), optax.adam(1e-2)).fit([data], steps=3).state
    trainer = Frozen(guide.Net(), optax.adam(1e-2))
    frozen = trainer.fit([data], steps=3).state
    assert isinstance(frozen.params, flax.core.FrozenDict)
    assert_same(flax.core.unfreeze(frozen.variables), flax.core.unfreeze(plain.variables))
    assert np.isfinite(trainer.evaluate([data])["loss"])


def test_what_was_read_stays_whole_when_training_goes_on():
    data, trainer = guide.samples(), guide.Regression(guide.Net(), optax.adam(1e-2))
    held = trainer.fit([data], steps=2).state
    kept = jax.device_get(held.variables)
    trainer.fit([data], steps=2)
    assert_same(held.variables, kept)
    with pytest.raises(ValueError, match="params"):
        trainer.state.replace_model_state({"params": {}})
