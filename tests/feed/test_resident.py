"""Data held on the device: the same numbers as from batches handed over, wherever they are picked."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import trainkit as tk
from tests.helpers.compare import assert_same
from tests.helpers.digits import Net, NetTrainer, arrays
from trainkit._calls.calls import Calls
from trainkit._debug.failures import kept_batches
from trainkit._feed import resident


def trainer_of(model=None, **options):
    log = tk.callbacks.LogMetrics(every=tk.Every(steps=5))
    return NetTrainer(model or Net(), optax.adam(1e-2), callbacks=[log], **options)


def says_held(trainer):
    return "bytes of data on the device" in trainer.summary()


@pytest.mark.parametrize(
    "options",
    [
        {"steps_per_call": 1},
        {"steps_per_call": 4},
        {"steps_per_call": 3, "accumulate": 2},
    ],
    ids=repr,
)
@pytest.mark.parametrize(
    "source",
    [{"shuffle": True, "seed": 3}, {"shuffle": False}, {"shuffle": True, "drop_last": False}],
    ids=repr,
)
def test_the_numbers_are_those_of_the_batches(options, source):
    # A last batch of four rows is padded and masked, which needs a model without batch statistics.
    model, data = Net(norm=source.get("drop_last", source["shuffle"])), arrays(100)
    held, whole = (trainer_of(model, **options) for _ in range(2))
    got = held.fit(tk.data.Arrays(data, 16, **source), epochs=3)
    listed = tk.data.Arrays(data, 16, **source, on_device=False)
    expected = whole.fit(lambda epoch: listed.batches(epoch), epochs=3)
    assert says_held(held)
    assert not says_held(whole)
    pick = lambda state: (state.params, state.opt_state, state.batch_stats)  # noqa: E731
    assert_same(pick(got.state), pick(expected.state), rtol=2e-6, atol=2e-6)
    losses = [[value for _, value in result.history["train/loss"]] for result in (got, expected)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert got.history["train/accuracy"] == expected.history["train/accuracy"]


class Seen(tk.Trainer):
    """Has as its only parameter what it has seen."""

    def loss(self, model, batch, ctx):
        (x, extra), weight = batch["parts"], batch["weight"]
        return model(jnp.concatenate([x, extra], axis=-1)) * weight, {}


class Weighted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("w", nn.initializers.zeros, (x.shape[-1],))


def test_gradients_are_those_of_numpy():
    rng = np.random.default_rng(0)
    # In 64 bits, which become 32 on the way to the device.
    data = {"parts": (rng.normal(size=(23, 2)), rng.normal(size=(23, 3))), "weight": rng.normal(size=23)}
    source = tk.data.Arrays(data, 5, shuffle=True, seed=1)
    trainer = Seen(Weighted(), optax.sgd(0.1))
    w = np.zeros(5)
    for epoch in range(2):
        for batch in source.batches(epoch):
            x = np.concatenate(batch["parts"], axis=1)
            w -= 0.1 * (x * batch["weight"][:, None]).mean(axis=0)
    params = trainer.fit(source, epochs=2).state.params
    assert says_held(trainer)
    np.testing.assert_allclose(params["w"], w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("start", [0, 2, 5])
def test_row_numbers_are_those_of_the_batches(shuffle, start):
    source = tk.data.Arrays(np.arange(23), 5, shuffle=shuffle, drop_last=False)
    for epoch in (0, 4):
        numbers = list(source.row_numbers(epoch, start))
        assert all(rows.dtype == np.int32 for rows in numbers)
        assert [rows.tolist() for rows in numbers] == [b.tolist() for b in source.batches(epoch, start)]
    with pytest.raises(ValueError, match="start=6"):
        source.row_numbers(0, 6)


def test_what_is_held_is_small_or_asked_for(monkeypatch):
    data = arrays(64)
    size = sum(leaf.nbytes for leaf in data.values())

    def held(**options):
        trainer = trainer_of()
        trainer.fit(tk.data.Arrays(data, 16, **options), steps=2)
        return says_held(trainer)

    monkeypatch.setitem(resident._MOST_BYTES, jax.default_backend(), size)
    assert held()
    assert not held(on_device=False)
    monkeypatch.setitem(resident._MOST_BYTES, jax.default_backend(), size - 1)
    assert not held()
    assert held(on_device=True)


def test_data_of_another_size_come_in_batches_and_compile_once(caplog):
    trainer, expected = trainer_of(), trainer_of(steps_per_call=1)
    sizes = (64, 48, 80, 64)
    for rows in sizes:
        trainer.fit(tk.data.Arrays(arrays(rows), 16), epochs=1)
        assert says_held(trainer) == (rows == 64)
        expected.fit(tk.data.Arrays(arrays(rows), 16, on_device=False), epochs=1)
    assert_same(trainer.state.params, expected.state.params, rtol=2e-6, atol=2e-6)
    assert "compiled again" not in caplog.text


def test_arrays_changed_between_two_fits_are_seen():
    data = {"parts": (np.ones((8, 2)), np.ones((8, 3))), "weight": np.ones(8, np.float32)}
    source, trainer = tk.data.Arrays(data, 4), Seen(Weighted(), optax.sgd(0.1))
    trainer.fit(source, epochs=1)
    data["weight"][:] = 0
    before = np.asarray(trainer.state.params["w"])
    np.testing.assert_array_equal(trainer.fit(source, epochs=1).state.params["w"], before)


def test_the_batches_of_a_call_that_raised_are_kept_whole(tmp_path, monkeypatch):
    run = Calls.__call__

    def out_of_memory(self, raw, packed, feds):
        if int(raw.step) >= 2:
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return run(self, raw, packed, feds)

    monkeypatch.setattr(Calls, "__call__", out_of_memory)
    source = tk.data.Arrays(arrays(64), 16, shuffle=True)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        trainer_of(steps_per_call=2, logdir=tmp_path).fit(source, epochs=1)
    for step, expected in enumerate(source.batches(0), start=1):
        kept = kept_batches(tmp_path, step)
        assert (kept is not None) == (step > 2)
        if kept is not None:
            assert_same(kept, [expected])


def test_a_run_broken_off_inside_an_epoch_ends_the_same(tmp_path):
    def run(logdir, stop=None):
        source = tk.data.Arrays(arrays(100), 8, shuffle=True, seed=5)
        callbacks = [tk.callbacks.Checkpoint(every=tk.Every(steps=4))]
        if stop:
            interrupt = lambda info: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
            callbacks.append(tk.callbacks.Lambda(every=tk.At(steps=(stop,)), on_step=interrupt))
        trainer = NetTrainer(Net(), optax.adam(1e-2), callbacks=callbacks, logdir=logdir, steps_per_call=3)
        result = trainer.fit(source, epochs=2, resume=True)
        assert says_held(trainer)
        return result

    expected = run(tmp_path / "whole")
    assert run(tmp_path / "broken", stop=7).step == 7
    resumed = run(tmp_path / "broken")
    assert resumed.step == expected.step == 24
    pick = lambda state: (state.params, state.opt_state, state.batch_stats)  # noqa: E731
    assert_same(pick(resumed.state), pick(expected.state))
    assert dict(resumed.history) == dict(expected.history)


def test_a_subclass_that_changes_its_batches_is_asked_for_them():
    class Doubled(tk.data.Arrays):
        def batches(self, epoch, start=0):
            return ({**batch, "x": 2 * batch["x"]} for batch in super().batches(epoch, start))

    data = arrays(64)
    trainer, expected = trainer_of(steps_per_call=1), trainer_of(steps_per_call=1)
    trainer.fit(Doubled(data, 16), epochs=1)
    assert not says_held(trainer)
    expected.fit([{**b, "x": 2 * b["x"]} for b in tk.data.Arrays(data, 16).batches(0)], epochs=1)
    assert_same(trainer.state.params, expected.state.params)
