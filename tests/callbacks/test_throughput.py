"""`Throughput`: rates over the window of steps alone, what is counted in the batches, and the time by parts."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainkit as tk
import trainkit._loop.run
from tests.helpers.runs import TEN, dies_at, saving
from tests.helpers.weight import numbers, trainer
from trainkit._loop.stopwatch import PARTS, Stopwatch
from trainkit.callbacks import Lambda, LogMetrics, Throughput
from trainkit.callbacks._peaks import peak_of

EVERY = tk.Every(steps=2)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it, in a list."""
    now = [1000.0]
    monkeypatch.setattr(trainkit._loop.run, "Stopwatch", functools.partial(Stopwatch, clock=lambda: now[0]))
    return now


def per_step(history, name):
    """What a rate comes to for each step, by step."""
    steps = dict(history["throughput/steps_per_second"])
    return {step: value / steps[step] for step, value in history[f"throughput/{name}"]}


def test_the_time_is_that_of_steps_and_data_alone(clock):
    def data():
        for batch in TEN:
            clock[0] += 2.0
            yield batch

    def passes(seconds):
        def act(*_):
            clock[0] += seconds

        return act

    def items(batch):
        clock[0] += 1e5
        return 3 * len(batch)

    slow = Lambda(
        on_fit_start=passes(7.0),
        on_epoch_start=passes(11.0),
        on_step=passes(100.0),
        on_eval_end=passes(1e3),
        on_epoch_end=passes(17.0),
    )

    def evaluation():
        clock[0] += 1e4
        yield TEN[0]

    one = trainer(slow, Throughput(EVERY, items={"parts": items}))
    history = one.fit(data, steps=8, eval_data=evaluation, eval_every=tk.Every(steps=3)).history
    # The batch after a step is read before the step is told: two a window, and at first one more.
    rates = dict(history["throughput/steps_per_second"])
    # What compiles in the first is real time, which this clock does not know.
    assert list(rates.values())[1:] == pytest.approx([2 / 4] * 3)
    assert list(rates) == [2, 4, 6, 8]
    assert [value for _, value in history["throughput/data_wait"]] == pytest.approx([1.0] * 4, abs=0.05)
    assert per_step(history, "examples_per_second") == pytest.approx(dict.fromkeys(rates, 4))
    assert per_step(history, "parts_per_second") == pytest.approx(dict.fromkeys(rates, 12))


def test_the_parts_are_those_of_the_result_and_add_up(clock):
    def passes(info):
        clock[0] += 5.0

    slow = Lambda(on_step=passes, on_fit_end=passes, close=lambda: passes(None))
    one = trainer(slow, Throughput(EVERY))
    result = one.fit(TEN, steps=5)
    assert [step for step, _ in result.history["time/step"]] == [2, 4, 5]
    found = {part: result.history.last(f"time/{part}") for part in PARTS}
    assert found == pytest.approx(dict(result.timing), abs=0.2)  # lowering the step is real time
    assert sum(found.values()) == pytest.approx(result.seconds)
    again = one.fit(TEN, steps=2)
    assert [step for step, _ in again.history["time/step"]] == [2, 4, 5, 6, 7]


class Sentences(tk.Trainer):
    """Batches of token ids `[rows, 6]`, a mask and a length for each row; the last batch is short and padded."""

    def loss(self, model, batch, ctx):
        tokens = model(jax.nn.one_hot(batch["ids"], 5).reshape(-1, 30))
        return jnp.square(tokens).mean(axis=-1), {}


LENGTHS = np.asarray([6, 1, 2, 3, 4, 5, 6, 1, 1, 2], np.int32)
SENTENCES = {
    "ids": np.ones((10, 6), np.int32),
    "length": LENGTHS,
    "mask": np.arange(6) < LENGTHS[:, None],
    "weight": (np.arange(6) < LENGTHS[:, None]).astype(np.float32) / 2,
}
ITEMS = {"tokens": lambda batch: batch["mask"].sum(), **{name: name for name in SENTENCES}}


@pytest.mark.parametrize("steps_per_call", [1, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("held", [True, False])
def test_items_are_those_of_real_rows(steps_per_call, accumulate, held):
    data = tk.data.Arrays(SENTENCES, batch_size=4, on_device=held)
    one = Sentences(
        nn.Dense(2),
        optax.sgd(0.1),
        callbacks=[Throughput(tk.Every(epochs=1), items=ITEMS)],
        accumulate=accumulate,
        steps_per_call=steps_per_call,
    )
    history = one.fit(data, epochs=2).history
    steps = 3 if accumulate == 1 else 2
    total = LENGTHS.sum()
    expected = {
        "tokens": total,
        "ids": 60,
        "length": total,
        "mask": total,
        "weight": total / 2,
        "examples": 10,
    }
    for name, number in expected.items():
        found = per_step(history, f"{name}_per_second")
        assert {step: value * steps for step, value in found.items()} == pytest.approx(
            {steps: number, 2 * steps: number}
        ), name


def test_operations_are_those_of_one_step_and_mfu_is_their_share_of_the_peak():
    features, rows = 64, 32
    x = np.ones((rows, features), np.float32)

    class Wide(tk.Trainer):
        def loss(self, model, batch, ctx):
            return jnp.square(model(batch)).mean(axis=-1), {}

    def step(params, x):
        def loss(params):
            return jnp.square(x @ params["kernel"] + params["bias"][None]).mean()

        gradients = jax.grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)

    params = {"kernel": jnp.ones((features, features)), "bias": jnp.ones(features)}
    by_hand = jax.jit(step).lower(params, x).compile().cost_analysis()["flops"]
    for calls in (1, 4):
        one = Wide(
            nn.Dense(features),
            optax.sgd(0.1),
            callbacks=[Throughput(tk.Every(steps=4), peak_flops=1e9)],
            steps_per_call=calls,
        )
        history = one.fit([x] * 4, epochs=2).history
        assert list(per_step(history, "flops_per_second").values()) == pytest.approx([by_hand] * 2, rel=0.1)
        mfu = dict(history["throughput/mfu"])
        assert {step: value / 1e9 for step, value in history["throughput/flops_per_second"]} == pytest.approx(
            mfu
        )


def test_the_peak_of_a_device_is_by_its_kind():
    assert peak_of("NVIDIA H100 80GB HBM3") == 9.89e14
    assert peak_of("NVIDIA A100-SXM4-40GB") == 3.12e14
    assert peak_of("NVIDIA L40S") == 3.62e14
    assert peak_of("TPU v5 lite") == 1.97e14
    assert peak_of("cpu") is None


def test_no_share_of_a_peak_that_is_not_known_and_no_look_at_batches_without_items():
    throughput = Throughput(EVERY)
    assert not throughput.implements("_see_batch")
    history = trainer(throughput).fit(TEN, steps=4).history
    assert {name for name in history if name.startswith("throughput/")} == {
        f"throughput/{name}"
        for name in ("steps_per_second", "examples_per_second", "data_wait", "flops_per_second")
    }


def test_a_resumed_run_writes_at_the_steps_of_one_never_interrupted(tmp_path):
    def run(folder, *others):
        one = saving(folder, Throughput(EVERY), LogMetrics(EVERY), *others, every=tk.Every(steps=2))
        return one.fit(TEN, steps=9, resume=True).history

    def written(history):
        return {name: [step for step, _ in series] for name, series in history.items()}

    whole = written(run(tmp_path / "whole"))
    with pytest.raises(ConnectionError):
        run(tmp_path / "cut", dies_at(7))
    assert written(run(tmp_path / "cut")) == whole
    assert whole["time/eval"] == [2, 4, 6, 8, 9]
    assert whole["throughput/data_wait"] == [2, 4, 6, 8]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"every": 5}, TypeError, r"tk\.Every"),
        ({"items": ["tokens"]}, TypeError, "expected names with a function"),
        ({"items": {"tokens": 3}}, TypeError, "a name stands for a function of a batch"),
        ({"items": {"": len}}, TypeError, "a name stands for"),
        ({"items": {"steps": len}}, ValueError, "steps_per_second is written already"),
        ({"peak_flops": 0}, ValueError, "peak_flops=0.*positive finite"),
        ({"peak_flops": float("nan")}, ValueError, "positive finite"),
        ({"peak_flops": "1e12"}, ValueError, "positive finite"),
    ],
    ids=str,
)
def test_bad_arguments(given, error, message):
    with pytest.raises(error, match=message):
        Throughput(**given)


def test_a_leaf_that_is_not_there_and_a_function_that_returns_no_number():
    with pytest.raises(ValueError, match=r"a batch has no leaf 'token'; its leaves are \(root\)"):
        trainer(Throughput(EVERY, items={"tokens": "token"})).fit(numbers(1), epochs=1)
    with pytest.raises(TypeError, match=r"must return a number.*got ndarray of shape \(4,\)"):
        trainer(Throughput(EVERY, items={"tokens": lambda batch: batch})).fit(numbers(1), epochs=1)
