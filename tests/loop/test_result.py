"""What a fit returns and how it may be cut short: results, timing, limits, dry runs, Ctrl-C."""

import itertools
import os
import pathlib
import signal

import numpy as np
import pytest

import trainkit as tk
from tests.helpers.runs import Script, dies_at, sigterm_at
from tests.helpers.weight import numbers, trainer, weight
from trainkit._loop.stopwatch import PARTS, Stopwatch
from trainkit.callbacks import Checkpoint, Lambda, LogMetrics

EACH = tk.Every(steps=1)
DATA = numbers(1, 2, 3, 4, 5)


# The result -------------------------------------------------------------------------------------------------


def test_a_result_has_the_last_and_the_best_of_every_metric_and_prints_them():
    script = Script({1: 3.0, 2: float("nan"), 3: 0.5, 4: 0.5, 5: 2.0})
    result = trainer(script, LogMetrics(EACH)).fit(DATA, epochs=1, eval_data=script.data, eval_every=EACH)
    loss = result.metrics["eval/loss"]
    # NaN never ranks, and of equal values the first does.
    assert (loss.last, loss.best, loss.best_step) == (2.0, 0.5, 3)
    assert (result.metrics["train/loss"].last, result.metrics["train/loss"].best) == (5.0, 1.0)
    epoch = result.metrics["epoch"]
    assert (epoch.last, epoch.best, epoch.best_step) == (1.0, None, None)
    said = str(result)
    assert said == repr(result)
    first, *lines = said.splitlines()
    assert first.startswith("FitResult(step=5, epoch=1, seconds=")
    assert first.endswith("stopped_by=None)")
    assert [line.split() for line in lines[:3]] == [
        ["epoch", "last", "1"],
        ["eval/loss", "last", "2", "best", "0.5", "(step", "3)"],
        ["train/loss", "last", "5", "best", "1", "(step", "1)"],
    ]
    assert lines[3].startswith("  time: ")


def test_the_best_is_by_the_direction_that_is_registered():
    import optax

    from tests.helpers.digits import Net, NetTrainer, batches

    data = batches(3)
    result = NetTrainer(Net(norm=False), optax.adam(1e-2)).fit(data, epochs=3, eval_data=data)
    values = [value for _, value in result.history["eval/accuracy"]]
    assert result.metrics["eval/accuracy"].best == max(values)
    assert result.metrics["eval/loss"].best == min(value for _, value in result.history["eval/loss"])


def test_timing_adds_up_to_the_whole(tmp_path):
    result = trainer(
        Checkpoint(), Lambda(on_step=lambda info: print(info.metrics["train/loss"])), logdir=tmp_path
    ).fit(DATA, epochs=2, eval_data=DATA)
    assert tuple(result.timing) == PARTS
    np.testing.assert_allclose(sum(result.timing.values()), result.seconds, rtol=0, atol=1e-9)
    assert min(result.timing.values()) > -1e-9
    assert all(result.timing[part] > 0 for part in ("data", "step", "eval", "save", "callbacks", "other"))


def test_each_second_counts_for_the_part_that_ran():
    now = [0.0]
    watch = Stopwatch(clock=lambda: now[0])

    def work(seconds):
        now[0] += seconds

    work(1)
    with watch.on("callbacks"):
        work(2)
        with watch.on("eval"):
            work(4)
        work(8)
    watch.turn("step")
    work(16)
    watch.move(5, "data")
    seconds, timing = watch.read()
    assert seconds == 31
    assert timing == {
        "compile": 0,
        "data": 5,
        "step": 11,
        "eval": 4,
        "save": 0,
        "callbacks": 10,
        "other": 1,
    }


def test_compilation_is_told_from_what_it_happened_in():
    import jax
    import jax.numpy as jnp

    watch = Stopwatch()
    with watch.noting_compilation():
        watch.turn("step")
        jax.jit(lambda x: jnp.tanh(x @ x) * 3.21)(np.ones((3, 3), np.float32)).block_until_ready()
        _, timing = watch.read()
        assert timing["compile"] > 0
        assert timing["step"] >= 0
    jax.jit(lambda x: jnp.tanh(x @ x) * 1.23)(np.ones((3, 3), np.float32))
    assert watch.read()[1]["compile"] == timing["compile"]  # no longer


def test_the_clock_is_looked_at_twice_a_call_where_nothing_is_due(monkeypatch):
    import functools

    import trainkit._loop.run

    looks = [0]

    def clock():
        looks[0] += 1
        return 0.0

    monkeypatch.setattr(trainkit._loop.run, "Stopwatch", functools.partial(Stopwatch, clock=clock))
    counts = []
    for steps in (5, 25):
        one = trainer(LogMetrics(tk.Never()))
        looks[0] = 0
        one.fit(numbers(*range(40)), steps=steps)
        counts.append(looks[0])
    assert counts[1] - counts[0] == 2 * 20


# Limits -----------------------------------------------------------------------------------------------------


def endless():
    return (np.full(4, index, np.float32) for index in itertools.count(1))


def test_a_limit_is_the_most_batches_of_each_pass():
    result = trainer().fit(DATA, epochs=2, limit=3)
    assert (result.step, result.epoch, weight(result.state)) == (6, 2, -12)
    assert trainer().fit(endless, epochs=2, limit=4).step == 8
    assert trainer().fit(DATA, epochs=1, limit=9).step == 5
    one = trainer()
    assert one.evaluate(DATA, limit=2)["loss"] == 1.5
    assert one.evaluate({"a": DATA, "b": endless}, limit=1) == {"a/loss": 1.0, "b/loss": 1.0}
    assert len(one.predict(DATA, limit=2)["twice"]) == 8
    found = []
    trainer(Lambda(on_fit_end=lambda info: found.append(info.evaluate(endless, limit=3)["loss"]))).fit(
        DATA, steps=1
    )
    assert found == [2.0]


@pytest.mark.parametrize("limit", [0, -1, 1.5, True])
def test_a_limit_that_is_no_number_of_batches_is_refused(limit):
    for ask in (
        trainer().evaluate,
        trainer().predict,
        lambda data, limit: trainer().fit(data, steps=1, limit=limit),
    ):
        with pytest.raises(ValueError, match=r"limit=.*: must be an int of at least 1, batches of a pass"):
            ask(DATA, limit=limit)


# Dry runs ---------------------------------------------------------------------------------------------------


def files(*folders):
    return {
        path: path.stat().st_mtime_ns
        for folder in folders
        for path in [folder, *pathlib.Path(folder).rglob("*")]
    }


@pytest.mark.parametrize("length", [{"steps": 100}, {"epochs": 9}], ids=str)
def test_a_dry_run_tries_everything_and_writes_nothing_outside_of_a_temporary_folder(
    tmp_path, monkeypatch, length
):
    places = [tmp_path / name for name in ("home", "run", "own", "temporary")]
    for place in places:
        place.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(places[0]))
    monkeypatch.setattr("tempfile.tempdir", str(places[3]))
    before, told, saved = files(*places[:3]), [], []
    keepers = [Checkpoint(tk.Every(steps=1000)), Checkpoint(tk.Every(epochs=70), folder=places[2])]
    late = Lambda(
        every=tk.Every(steps=500),
        on_step=lambda info: told.append(("step", info.step)),
        on_eval_end=lambda info: told.append(("eval", info.step)),
        on_save=lambda info: saved.append((info.step, info.logdir, info.plan.dry_run)),
    )
    one = trainer(late, *keepers, logdir=places[1], dry_run=3)
    result = one.fit(
        DATA, eval_data={"a": DATA, "b": endless}, eval_every=tk.Every(steps=700), resume=True, **length
    )
    assert (result.step, result.stopped_by, weight(result.state)) == (3, None, -6)
    assert told == [("step", 3), ("eval", 3)]
    assert result.history["a/loss"] == [(3, 2.0)]
    ((step, logdir, dry),) = saved
    assert (step, dry) == (3, True)
    assert places[3] in logdir.parents
    assert files(*places[:3]) == before
    assert not list(places[3].iterdir())


def test_a_dry_run_finds_what_a_long_run_would_meet_late(tmp_path):
    with pytest.raises(ConnectionError):
        trainer(dies_at(2), dry_run=2).fit(DATA, epochs=9)
    with pytest.raises(ValueError, match="eval/acc"):
        trainer(tk.callbacks.EarlyStopping("eval/acc", mode="max"), dry_run=1).fit(
            DATA, epochs=9, eval_data=DATA, eval_every=tk.Every(steps=1000)
        )


@pytest.mark.parametrize("steps", [0, True, 2.0, "all"])
def test_a_dry_run_of_no_number_of_steps_is_refused(steps):
    with pytest.raises(ValueError, match=r"dry_run=.*must be an int of at least 1"):
        trainer(dry_run=steps)


# Ctrl-C -----------------------------------------------------------------------------------------------------


def ctrl_c_at(step):
    return Lambda(on_step=lambda info: os.kill(os.getpid(), signal.SIGINT) if info.step == step else None)


def test_ctrl_c_returns_or_raises_after_all_is_saved(tmp_path):
    for name in ("return", "raise"):
        (tmp_path / name).mkdir()
    returned = trainer(ctrl_c_at(2), Checkpoint(), logdir=tmp_path / "return").fit(DATA, epochs=9)
    assert (returned.step, returned.stopped_by) == (2, "SIGINT")
    closed = []
    one = trainer(
        ctrl_c_at(2),
        Checkpoint(),
        Lambda(close=lambda: closed.append(1)),
        logdir=tmp_path / "raise",
        interrupt="raise",
    )
    with pytest.raises(KeyboardInterrupt) as caught:
        one.fit(DATA, epochs=9)
    result = caught.value.result
    assert type(caught.value) is KeyboardInterrupt
    assert (result.step, result.stopped_by, closed) == (2, "SIGINT", [1])
    assert weight(one.state) == weight(result.state) == -3
    assert [info.step for info in tk.checkpoint.list(tmp_path / "raise")] == [2]


def test_only_ctrl_c_is_raised_and_a_fit_that_ends_by_itself_is_not():
    assert trainer(sigterm_at(2), interrupt="raise").fit(DATA, epochs=9).stopped_by == "SIGTERM"
    assert trainer(interrupt="raise").fit(DATA, epochs=1).stopped_by is None
    with pytest.raises(ValueError, match=r"interrupt='stop'.*'return'.*'raise'"):
        trainer(interrupt="stop")


# Words ------------------------------------------------------------------------------------------------------


def test_a_batch_of_its_own_shape_is_said_once_for_all_evaluations(caplog):
    import optax

    from tests.helpers.digits import Net, batches
    from tests.trainer.test_training import ScalarTrainer

    data = [*batches(1), {name: value[:5] for name, value in batches(1)[0].items()}]
    one = ScalarTrainer(Net(norm=False), optax.sgd(0.1))
    one.fit(data[:1], epochs=2, eval_data=data)
    one.evaluate(data)
    said = [record.message for record in caplog.records if "at its own shape" in record.message]
    assert len(said) == 1
    assert said[0].startswith("an evaluation batch has 5 examples")


def test_a_first_batch_without_rows_is_refused():
    empty = [np.zeros(0, np.float32)]
    for ask in (
        lambda: trainer().fit(empty, steps=1),
        lambda: trainer().evaluate(empty),
        lambda: trainer().predict(empty),
    ):
        with pytest.raises(ValueError, match=r"a batch for \w+ has 0 rows"):
            ask()
