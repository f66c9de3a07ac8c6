"""`NanGuard` where the number that is not one is met by one device of eight: all refuse the update."""

import jax
import numpy as np
import optax
import pytest

import trainkit as tk
from tests.helpers.compare import assert_same
from tests.helpers.digits import Net, NetTrainer, batches
from trainkit._debug.diagnosis import diagnose
from trainkit.data._source import as_source

STRATEGIES = {
    "data=8": tk.parallel.Mesh,
    "fsdp=8": lambda: tk.parallel.Mesh(fsdp=8),
    "PerExample": tk.parallel.PerExample,
    "Pmap": tk.parallel.Pmap,
}


class Own(NetTrainer):
    """The ordinary update, as a step of one's own."""

    def train_step(self, state, batch):
        return super().train_step(state, batch)


def made(strategy, callback, kind=NetTrainer, **options):
    axis = "batch" if strategy in ("PerExample", "Pmap") else None
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    return kind(
        Net(rate=0.0, axis_name=axis),
        tx,
        strategy=STRATEGIES[strategy](),
        callbacks=[callback, tk.callbacks.EMA(0.9)],
        **options,
    )


@pytest.mark.parametrize("kind", [NetTrainer, Own])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_device_has_a_bad_example(strategy, kind):
    good, bad = batches(2), batches(2)
    bad[1]["x"][5, 2] = np.nan
    expected = jax.device_get(
        made(strategy, tk.callbacks.NanGuard("skip"), kind).fit(good[:1], epochs=1).state
    )
    skipping = made(strategy, tk.callbacks.NanGuard("skip"), kind)
    after = skipping.fit(bad, epochs=1)
    assert after.history["skipped_steps"] == [(2, 1)]
    state = jax.device_get(after.state)
    for name in ("params", "opt_state", "batch_stats"):
        assert_same(getattr(state, name), getattr(expected, name))
    assert_same(state.hooks["ema"], expected.hooks["ema"])
    for leaf in jax.tree.leaves(after.state.params):
        shards = [np.asarray(shard.data) for shard in leaf.addressable_shards if leaf.is_fully_replicated]
        assert all(np.array_equal(shard, shards[0]) for shard in shards)
    raising = made(strategy, tk.callbacks.NanGuard(every=tk.Every(steps=1)), kind)
    with pytest.raises(tk.NonFiniteError, match="step 2 is not finite, and loss"):
        raising.fit(bad, epochs=1)
    assert_same(jax.device_get(raising.state.params), expected.params)


@pytest.mark.parametrize(("strategy", "jit"), [*((name, True) for name in STRATEGIES), ("data=8", False)])
def test_the_diagnosis_of_a_step(strategy, jit):
    (batch,) = batches(1)
    batch["x"][5, 2] = np.nan
    trainer = made(strategy, tk.callbacks.NanGuard())
    state = trainer.init(batch)
    engine = trainer._engine
    fed = engine.prepare_train(state, as_source([batch]), batch).feed.place(batch)
    found = diagnose(engine.steps, engine.strategy, engine.given(), state, fed.batch, fed.mask, jit=jit)
    assert (found.first_module, found.inputs_finite) == ("Net/Dense_0 (__call__)", False)
    assert (found.step, found.first_leaf) == (1, "loss")
