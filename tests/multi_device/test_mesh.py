"""Data parallelism over eight devices equals a loop written for one."""

import functools

import jax
import numpy as np
import optax
import pytest

import trainkit as tk
from tests.helpers.by_hand import hand_step, start
from tests.helpers.compare import assert_same
from tests.helpers.digits import Net, NetTrainer, arrays, batches

# Sums over devices are taken in another order: after 20 steps that is this much in float32 and no more.
CLOSE = {"rtol": 2e-4, "atol": 2e-6}
DECAY, STEPS = 0.9, 20


class Run:
    """A loop by hand on one device: its state, its losses step by step, and its averages."""

    def __init__(self, model, data):
        self.state, self.losses = start(model, optax.sgd(0.05, momentum=0.9), data[0]), []
        self.average = self._averaged(self.state)
        for index in range(STEPS):
            self.state, loss = hand_step(self.state, data[index % len(data)])
            self.losses.append(float(loss))
            now = self._averaged(self.state)
            self.average = jax.tree.map(lambda e, p: DECAY * e + (1 - DECAY) * p, self.average, now)

    @staticmethod
    def _averaged(state):
        return jax.tree.map(np.asarray, (state.params, state.batch_stats))


def sizes(*rows):
    return [arrays(count, seed=index) for index, count in enumerate(rows)]


DATA = {"divides": batches(4), "last of 5": sizes(16, 16, 16, 5), "none divides": sizes(12, 12, 5)}


@functools.cache
def run(norm, kind):
    return Run(Net(norm=norm), DATA[kind])


def train(model, data, strategy="jit"):
    callbacks = [tk.callbacks.EMA(DECAY), tk.callbacks.LogMetrics(every=tk.Every(steps=1))]
    made = NetTrainer(model, optax.sgd(0.05, momentum=0.9), strategy=strategy, callbacks=callbacks)
    return made, made.fit(data, steps=STEPS)


def assert_equals(result, expected):
    state, ema = result.state, result.state.hooks["ema"]
    assert_same(state.params, expected.state.params, **CLOSE)
    assert_same(state.model_state, expected.state.model_state, **CLOSE)
    assert_same(state.opt_state, expected.state.opt_state, **CLOSE)
    assert_same(state.rng, expected.state.rng)
    assert_same(jax.tree.map(np.asarray, (ema.params, ema.batch_stats)), expected.average, **CLOSE)
    assert int(ema.count) == result.step == STEPS
    np.testing.assert_allclose(
        [value for _, value in result.history["train/loss"]], expected.losses, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("norm", "kind"),
    [(True, "divides"), (True, "none divides"), (False, "last of 5"), (False, "none divides")],
)
def test_eight_devices_equal_one(norm, kind, caplog):
    made, result = train(Net(norm=norm), DATA[kind])
    assert_equals(result, run(norm, kind))
    # Whole on each of the eight, and the same there.
    for leaf in jax.tree.leaves(result.state):
        assert leaf.is_fully_replicated
        assert len(leaf.sharding.device_set) == 8
    for leaf in jax.tree.leaves(result.state.params):
        assert_same([shard.data for shard in leaf.addressable_shards], 8 * [leaf.addressable_data(0)])
    # Batch statistics must see no padding, so a short batch is compiled at its own shape, and that is said.
    own_shape = norm and kind == "none divides"
    assert made._engine.steps.traces.count("training") == (2 if own_shape else 1)
    assert ("own shape" in caplog.text) == own_shape


def test_a_second_fit_and_an_update_compile_nothing():
    update = tk.callbacks.Lambda(every=tk.At(steps=(3,)), on_step=lambda info: tk.Update(lambda state: state))
    made = NetTrainer(Net(), optax.sgd(0.1), callbacks=[update])
    for _ in range(2):
        made.fit(batches(4), epochs=1, eval_data=batches(2))
    made.evaluate(batches(3))
    assert made._engine.steps.traces.count("training") == 1
    assert made._engine.steps.traces.count("evaluation") == 1


def test_four_of_eight_devices(devices):
    _, result = train(Net(), DATA["divides"], tk.parallel.Mesh(devices=devices(8)[:4]))
    assert_equals(result, run(True, "divides"))
    for leaf in jax.tree.leaves(result.state):
        assert leaf.sharding.device_set == set(devices(8)[:4])


@functools.cache
def trained():
    return train(Net(), DATA["divides"])[0]


@pytest.mark.parametrize("batch_size", [8, 12])
@pytest.mark.parametrize("size", [1, 5, 97])
def test_evaluation_and_prediction_are_exact(size, batch_size):
    data, made = arrays(size, seed=5), trained()
    source = tk.data.Arrays(data, batch_size=batch_size)
    live = jax.device_get(made.state.variables)
    logits = np.asarray(made.state.apply_fn(live, data["x"], train=False), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    got = made.evaluate(source, weights="live")
    np.testing.assert_allclose(got["loss"], -log_p[np.arange(size), data["y"]].mean(), rtol=1e-5)
    assert got["accuracy"] == pytest.approx((logits.argmax(-1) == data["y"]).mean(), abs=1e-12)
    predicted = made.predict(source, weights="live")
    np.testing.assert_allclose(predicted["logits"], logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(predicted["labels"], data["y"])


def test_evaluation_reads_the_average():
    made, data = trained(), arrays(97, seed=6)
    params, stats = run(True, "divides").average
    logits = made.state.apply_fn({"params": params, "batch_stats": stats}, data["x"], train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, data["y"])
    got = made.evaluate(tk.data.Arrays(data, batch_size=12))
    np.testing.assert_allclose(got["loss"], np.asarray(losses, np.float64).mean(), rtol=1e-4)
