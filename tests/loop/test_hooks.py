"""The hooks of callbacks: when they are called, with what, and what follows from what they do."""

import collections
import functools

import clu.metrics
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainkit as tk
import trainkit._loop.run
import trainkit._step.steps
from tests.helpers.compare import assert_same
from tests.helpers.digits import Net, NetTrainer, batches
from tests.helpers.transcript import Recorder, calls, lines
from tests.helpers.weight import numbers, traces, trainer, weight
from trainkit._loop.dispatch import Dispatcher
from trainkit._loop.stopwatch import Stopwatch
from trainkit.callbacks import Callback, Lambda
from trainkit.callbacks._callback import Phase
from trainkit.hooks import StepHook

HOOKS = (
    "on_fit_start",
    "on_epoch_start",
    "on_step",
    "on_eval_start",
    "on_eval_end",
    "on_epoch_end",
    "on_fit_end",
)
TWO, THREE = numbers(1, 2), numbers(1, 2, 3)


def raising(error):
    def act(*info):
        raise error

    return act


# Transcripts ------------------------------------------------------------------------------------------------


def test_transcript_of_a_fit():
    recorder = Recorder()
    trainer(recorder).fit(TWO, epochs=2)
    assert recorder.log == lines("""
        fit_start 0 0
        epoch_start 0 1
        step 1 1
        step 2 1
        epoch_end 2 1
        epoch_start 2 2
        step 3 2
        step 4 2
        epoch_end 4 2
        fit_end 4 2
        close
    """)


def test_transcript_with_evaluation_after_each_epoch():
    recorder = Recorder()
    trainer(recorder).fit(TWO, epochs=2, eval_data={"a": TWO, "b": TWO})
    assert recorder.log == lines("""
        fit_start 0 0
        epoch_start 0 1
        step 1 1
        step 2 1
        eval_start 2 1
        eval_end 2 1
        epoch_end 2 1
        epoch_start 2 2
        step 3 2
        step 4 2
        eval_start 4 2
        eval_end 4 2
        epoch_end 4 2
        fit_end 4 2
        close
    """)


def test_transcript_with_evaluation_inside_the_epoch():
    recorder = Recorder(every=tk.Every(steps=3))
    trainer(recorder).fit(THREE, epochs=2, eval_data=TWO, eval_every=tk.Every(steps=2))
    assert recorder.log == lines("""
        fit_start 0 0
        epoch_start 0 1
        eval_start 2 1
        eval_end 2 1
        step 3 1
        epoch_end 3 1
        epoch_start 3 2
        eval_start 4 2
        eval_end 4 2
        step 6 2
        eval_start 6 2
        eval_end 6 2
        epoch_end 6 2
        fit_end 6 2
        close
    """)


def test_transcript_of_a_fit_that_ends_inside_an_epoch_and_of_one_that_goes_on():
    recorder = Recorder()
    made = trainer(recorder)
    made.fit(THREE, steps=4, eval_data=TWO)
    assert recorder.log == lines("""
        fit_start 0 0
        epoch_start 0 1
        step 1 1
        step 2 1
        step 3 1
        eval_start 3 1
        eval_end 3 1
        epoch_end 3 1
        epoch_start 3 2
        step 4 2
        eval_start 4 2
        eval_end 4 2
        epoch_end 4 2
        fit_end 4 2
        close
    """)
    recorder.log.clear()
    result = made.fit(THREE, steps=3)
    assert recorder.log == lines("""
        fit_start 4 2
        epoch_start 4 2
        step 5 2
        step 6 2
        epoch_end 6 2
        epoch_start 6 3
        step 7 3
        epoch_end 7 3
        fit_end 7 3
        close
    """)
    assert weight(result.state) == -(1 + 2 + 3) * 2 - 1


def test_questions_are_no_events():
    recorder = Recorder()
    made = trainer(recorder)
    made.init(TWO[0])
    assert made.evaluate(TWO) == {"loss": 1.5}
    np.testing.assert_array_equal(made.predict(TWO)["twice"], [2, 2, 2, 2, 4, 4, 4, 4])
    assert recorder.log == []


def test_phases_at_one_step_and_the_given_order_within_one():
    log = []
    order = [("c1", 3), ("m1", 2), ("w1", 1), ("c2", 3), ("w2", 1), ("m2", 2)]
    callbacks = [Recorder(log, name, phase=Phase(phase)) for name, phase in order]
    trainer(*callbacks).fit(TWO, epochs=1, eval_data=TWO, eval_every=tk.Every(steps=1))
    sorted_names = ["w1", "w2", "m1", "m2", "c1", "c2"]
    for hook in ("fit_start", "epoch_start", "epoch_end", "fit_end", "close"):
        assert calls(log, hook) == sorted_names
    first = [line for line in log if line.endswith(" 1 1")]
    assert first == [
        *[f"{name} step 1 1" for name in sorted_names[:4]],
        *[f"{name} eval_start 1 1" for name in sorted_names],
        *[f"{name} eval_end 1 1" for name in sorted_names],
        *[f"{name} step 1 1" for name in sorted_names[4:]],
    ]


# Cadences ---------------------------------------------------------------------------------------------------


def steps_of(recorder):
    return [int(line.split()[1]) for line in recorder.log if line.startswith("step")]


def test_cadences_of_on_step():
    recorders = {
        every: Recorder(every=every)
        for every in (tk.Every(steps=4), tk.At(steps=(2, 7, 90)), tk.Never(), tk.Every(epochs=2))
    }
    made = trainer(*recorders.values())
    made.fit(THREE, steps=7)
    made.fit(THREE, steps=6)
    found = [steps_of(recorder) for recorder in recorders.values()]
    # Epochs end at steps 3, 6, 9 and 12; the second fit takes up the third epoch in its middle.
    assert found == [[4, 8, 12], [2, 7], [], [6, 12]]


class Time:
    """A clock that stands still unless it is told."""

    now = 0.0

    def __call__(self):
        return self.now


def test_cadence_in_seconds(monkeypatch):
    clock = Time()
    monkeypatch.setattr(trainkit._loop.run, "Stopwatch", functools.partial(Stopwatch, clock=clock))
    seconds, told = Recorder(every=tk.Every(seconds=3)), []
    # The clock ticks after each step, so at step n it shows n - 1, but for the jump at step 8.
    ticks = Lambda(on_step=lambda info: setattr(clock, "now", clock.now + (10 if info.step == 8 else 1)))
    evals = Lambda(on_eval_end=lambda info: told.append(info.step))
    result = trainer(ticks, seconds, evals).fit(TWO, steps=12, eval_data=TWO, eval_every=tk.Every(seconds=5))
    # An interval counts from when it was last due: 0, 3, 6, then 17, then 20; and 0, 5, then 17.
    assert steps_of(seconds) == [4, 7, 9, 12]
    assert told == [6, 9]
    assert result.seconds == clock.now == 21


def test_evaluation_at_given_steps_and_never():
    recorder = Recorder()
    made = trainer(recorder)
    made.fit(TWO, steps=5, eval_data=TWO, eval_every=tk.At(steps=(2, 3)))
    made.fit(TWO, steps=2, eval_data=TWO, eval_every=tk.Never())
    assert [line for line in recorder.log if "eval_end" in line] == ["eval_end 2 1", "eval_end 3 2"]


# Hooks that are not overridden ------------------------------------------------------------------------------


def test_a_hook_that_is_not_overridden_is_never_called(monkeypatch):
    for hook in (*HOOKS, "on_exception", "close"):
        monkeypatch.setattr(Callback, hook, raising(AssertionError(f"{hook} was called")))

    class OnlyEvaluations(Callback):
        seen = 0

        def on_eval_end(self, info):
            self.seen += 1

    callback = OnlyEvaluations()
    trainer(callback, Callback()).fit(TWO, epochs=2, eval_data=TWO)
    assert callback.seen == 2


def test_no_info_is_made_for_a_hook_that_is_not_overridden():
    made = collections.Counter()

    class Info:
        def expire(self):
            made["expired"] += 1

    def info_for(callback, hook):
        made[hook] += 1
        return Info()

    callbacks = [Callback(), Lambda(on_epoch_end=lambda info: None), Lambda(close=lambda: None)]
    dispatcher = Dispatcher(callbacks, info_for, act=None)
    dispatcher.start()
    for hook in HOOKS[1:]:
        dispatcher.call(hook)
    dispatcher.exception(ValueError())
    assert dispatcher.close() == []
    assert made == {"on_epoch_end": 1, "expired": 1}


def test_lambda_in_a_fit():
    seen = []
    callback = Lambda(
        every=tk.Every(steps=3),
        on_fit_start=lambda info: seen.append("start"),
        on_step=lambda info: seen.append(info.step) or (tk.Stop("seen enough") if info.step == 6 else None),
        close=lambda: seen.append("close"),
    )
    result = trainer(callback).fit(TWO, steps=100)
    assert (seen, result.stopped_by) == (["start", 3, 6, "close"], "seen enough")


# Stopping ---------------------------------------------------------------------------------------------------

STOPS = {
    "fit_start": (0, 0, ["fit_start 0 0", "fit_end 0 0", "close"]),
    "epoch_start": (3, 1, ["epoch_end 3 1", "epoch_start 3 2", "epoch_end 3 2", "fit_end 3 1", "close"]),
    "step": (4, 2, ["step 4 2", "eval_start 4 2", "eval_end 4 2", "epoch_end 4 2", "fit_end 4 2", "close"]),
    "eval_start": (3, 1, ["eval_start 3 1", "eval_end 3 1", "epoch_end 3 1", "fit_end 3 1", "close"]),
    "eval_end": (3, 1, ["eval_start 3 1", "eval_end 3 1", "epoch_end 3 1", "fit_end 3 1", "close"]),
    "epoch_end": (3, 1, ["eval_end 3 1", "epoch_end 3 1", "fit_end 3 1", "close"]),
}
STOPS_AT = {"epoch_start": 3, "step": 4}


@pytest.mark.parametrize("hook", STOPS)
def test_stop(hook):
    def stop(info):
        return tk.Stop(f"from {hook}") if info.step >= STOPS_AT.get(hook, 0) else None

    # No `on_step` but the one that stops: a stop must not wait for the next step at which something is due.
    recorder = Recorder(every=tk.At(steps=(4,)) if hook == "step" else tk.Never(), **{hook: stop})
    made = trainer(recorder, Lambda(every=tk.Never(), on_step=raising(AssertionError())))
    result = made.fit(THREE, epochs=9, eval_data=TWO)
    step, epoch, end = STOPS[hook]
    assert (result.step, result.epoch, result.stopped_by) == (step, epoch, f"from {hook}")
    assert recorder.log[-len(end) :] == end
    recorder.acts.clear()
    # Whatever was broken off is finished, and nothing is left out.
    assert made.fit(THREE, steps=9 - step).epoch == 3
    assert weight(made.state) == -(1 + 2 + 3) * 3


def test_the_first_stop_is_the_one_told():
    first = Lambda(on_step=lambda info: tk.Stop("first") if info.step == 2 else None)
    second = Lambda(on_step=lambda info: tk.Stop("second") if info.step == 2 else None)
    assert trainer(first, second).fit(TWO, epochs=3).stopped_by == "first"


# Exceptions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("hook", [hook.removeprefix("on_") for hook in HOOKS])
def test_an_exception_in_a_hook(hook, kind):
    log, error = [], kind("first")
    before = Recorder(log, "a", close=raising(RuntimeError("later")))
    failing = Recorder(log, "b", **{hook: raising(error)})
    made = trainer(before, failing, Recorder(log, "c"))
    with pytest.raises(kind) as caught:
        made.fit(TWO, epochs=1, eval_data=TWO)
    assert caught.value is error
    assert error.__notes__ == ["close of a callback raised as well: RuntimeError('later')"]
    begun = ["a", "b"] if hook == "fit_start" else ["a", "b", "c"]
    assert calls(log, "exception") == begun
    assert calls(log, "close") == begun
    assert log[-2 * len(begun)].startswith("a exception")
    # The trainer is as good as new: its state holds the steps made.
    before.acts.clear()
    failing.acts.clear()
    done = {"fit_start": 0, "epoch_start": 0, "step": 1}.get(hook, 2)
    assert int(made.state.step) == done
    assert made.fit(TWO, steps=2).step == done + 2


def test_an_exception_in_close_is_raised_after_all_are_closed():
    log = []
    closing = [Recorder(log, name, close=raising(ValueError(name))) for name in "ab"]
    with pytest.raises(ValueError, match="a") as caught:
        trainer(*closing, Recorder(log, "c")).fit(TWO, steps=1)
    assert caught.value.args == ("a",)
    assert calls(log, "close") == ["a", "b", "c"]
    assert calls(log, "exception") == []


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_exception_while_telling_of_an_exception(kind):
    log, first = [], ValueError("first")
    telling = Recorder(log, "a", step=raising(first), exception=raising(kind("second")))
    with pytest.raises(ValueError, match="first") as caught:
        trainer(telling, Recorder(log, "b")).fit(TWO, steps=1)
    assert caught.value is first
    assert "second" in "".join(first.__notes__)
    assert calls(log, "exception") == calls(log, "close") == ["a", "b"]


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_an_exception_in_the_data(kind):
    recorder, broken = Recorder(every=tk.Never()), True

    def source(epoch):
        yield from TWO
        if epoch == 1 and broken:
            raise kind("disk")
        yield THREE[2]

    # Ctrl-C does not wait for the steps whose batches were read for the same call.
    every_step = Lambda(on_step=lambda info: None)
    made = trainer(recorder, every_step)
    with pytest.raises(kind, match="disk"):
        made.fit(source, epochs=3)
    assert recorder.log[-3:] == ["epoch_start 3 2", "exception 5 2", "close"]
    assert (int(made.state.step), weight(made.state)) == (5, -(1 + 2 + 3) - (1 + 2))
    broken = False
    # The pass broken off goes on behind the batches it has used.
    assert made.fit(source, epochs=1).step == 6
    assert weight(made.state) == -(1 + 2 + 3) * 2


def test_an_exception_in_the_data_of_an_evaluation():
    def source():
        yield TWO[0]
        raise OSError("disk")

    recorder = Recorder()
    with pytest.raises(OSError, match="disk"):
        trainer(recorder).fit(TWO, epochs=1, eval_data=source)
    assert recorder.log[-3:] == ["eval_start 2 1", "exception 2 1", "close"]


def test_numbers_that_are_not_finite_pass_through():
    result = trainer(tk.callbacks.LogMetrics(every=tk.Every(steps=1))).fit(numbers(1, np.nan, 2), epochs=1)
    assert result.step == 3
    assert np.isnan(weight(result.state))
    np.testing.assert_array_equal([value for _, value in result.history["train/loss"]], [1, np.nan, np.nan])


# Callbacks used again ---------------------------------------------------------------------------------------


def test_a_callback_serves_a_second_fit_and_another_trainer():
    recorder = Recorder()
    first, second = trainer(recorder), trainer(recorder)
    first.fit(TWO, epochs=1)
    once = list(recorder.log)
    second.fit(TWO, epochs=1)
    assert recorder.log == 2 * once
    recorder.log.clear()
    first.fit(TWO, epochs=1)
    assert recorder.log == lines("""
        fit_start 2 1
        epoch_start 2 2
        step 3 2
        step 4 2
        epoch_end 4 2
        fit_end 4 2
        close
    """)


def test_a_callback_serves_again_after_an_exception():
    recorder = Recorder(step=raising(ValueError("odd")))
    made = trainer(recorder)
    with pytest.raises(ValueError, match="odd"):
        made.fit(TWO, epochs=1)
    recorder.acts.clear()
    recorder.log.clear()
    made.fit(TWO, steps=1)
    assert recorder.log == lines("""
        fit_start 1 1
        epoch_start 1 1
        step 2 1
        epoch_end 2 1
        fit_end 2 1
        close
    """)


# What a hook is told and may do -----------------------------------------------------------------------------


def during(look, **options):
    """What `look(info)` gave in a hook of a fit of 2 epochs of `TWO`, at the first step."""
    found = []
    callback = Lambda(every=tk.At(steps=(1,)), on_step=lambda info: found.append(look(info)))
    trainer(callback, **options).fit(TWO, epochs=2, eval_data={"a": TWO})
    return found[0]


def test_info_tells_where_the_fit_stands(tmp_path):
    def look(info):
        plan = info.plan
        return (
            (info.step, info.epoch, int(info.state.step), weight(info.state), info.logdir),
            (plan.first_step, plan.steps, plan.epochs, plan.steps_per_epoch, plan.eval_names),
            (info.direction("a/loss"), info.direction("train/twice"), len(info.history)),
        )

    place, plan, rest = during(look, logdir=tmp_path)
    assert place == (1, 1, 1, -1.0, tmp_path)
    assert plan == (0, 4, 2, 2, ("a",))
    assert rest == ("min", None, 0)


def test_info_is_read_only():
    def look(info):
        for name in ("step", "state", "metrics", "anything"):
            with pytest.raises(AttributeError, match=rf"info\.{name} is read-only.*tk\.Stop.*tk\.Update"):
                setattr(info, name, 3)
        with pytest.raises(TypeError):
            info.metrics["train/loss"] = 0.0
        with pytest.raises(TypeError):
            info.history["train/loss"] = []
        return info.step

    assert during(look) == 1


def test_the_state_is_refused_after_the_call():
    info = during(lambda info: info)
    with pytest.raises(RuntimeError, match=r"only during the hook.*jax\.device_get"):
        _ = info.state
    assert info.step == 1


def test_update_replaces_the_state():
    def update(info):
        return tk.Update(lambda state: state.replace(params={"w": state.params["w"] + 100}))

    trainer().fit(TWO, epochs=1)  # what a test before this one compiled may be of another form
    compiled = traces()
    callback = Lambda(every=tk.At(steps=(2,)), on_fit_start=update, on_step=update, on_fit_end=update)
    result = trainer(callback).fit(TWO, epochs=2)
    assert weight(result.state) == 300 - 2 * (1 + 2)
    # A state of Python and NumPy numbers is taken in as the arrays it stands for.
    plain = Lambda(on_fit_start=lambda info: tk.Update(lambda s: s.replace(params={"w": np.float32(7)})))
    assert weight(trainer(plain).fit(TWO, epochs=1).state) == 7 - (1 + 2)
    assert traces() == compiled


def test_update_may_return_what_it_was_given():
    kept = []
    same = Lambda(on_step=lambda info: kept.append(info.state) or tk.Update(lambda state: kept[-1]))
    assert weight(trainer(same).fit(TWO, epochs=2).state) == -2 * (1 + 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.replace(params={"w": np.zeros(3, np.float32)}),
            r"params/w: float32\[\] -> float32\[3\]",
        ),
        (lambda s: s.replace(params={"w": np.int32(1)}), r"params/w: float32\[\] -> int32\[\]"),
        (lambda s: s.replace(params={}), r"params/w: float32\[\] -> absent"),
    ],
)
def test_update_that_changes_the_structure_is_refused(change, message):
    class Changes(Callback):
        def on_step(self, info):
            return tk.Update(change)

    made = trainer(Changes())
    with pytest.raises(
        ValueError, match=f"Changes returned an Update that changes.*{message}.*Keep structure"
    ):
        made.fit(TWO, epochs=1)
    assert weight(made.state) == -1


@pytest.mark.parametrize("garbage", [3, "stop", False, {}, tk.Stop])
def test_anything_else_returned_is_refused(garbage):
    class Odd(Callback):
        def on_epoch_end(self, info):
            return garbage

    with pytest.raises(
        TypeError, match=r"Odd\.on_epoch_end returned .*tk\.Stop\(reason\), tk\.Update\(fn\), .* or None"
    ):
        trainer(Odd()).fit(TWO, epochs=1)


# Metrics ----------------------------------------------------------------------------------------------------


class Reads(Callback):
    """Reads the training loss at its cadence: `seen[step]`."""

    def __init__(self, every):
        self.every, self.seen = every, {}

    def on_step(self, info):
        self.seen[info.step] = info.metrics["train/loss"]


def uneven(count, seed=0):
    """Batches of unlike sizes and numbers, the first the largest: those after it are padded."""
    rng = np.random.default_rng(seed)
    return [
        rng.normal(size=4 if not index else rng.integers(1, 5)).astype(np.float32) for index in range(count)
    ]


@pytest.mark.parametrize(
    ("count", "cadences"),
    [
        (150, (1, 3, 7, 100, 149)),  # the last two hold more segments than are kept apart
        (1100, (1050,)),  # the loop hands over twice what the device carries
    ],
)
def test_each_callback_reads_the_exact_mean_since_it_read_last(count, cadences):
    data = uneven(count)
    readers = [Reads(tk.Every(steps=every)) for every in cadences]
    trainer(tk.callbacks.LogMetrics(every=tk.Never()), *readers).fit(data, epochs=1)
    for every, reader in zip(cadences, readers, strict=True):
        steps = range(every, count + 1, every)
        expected = [np.concatenate(data[step - every : step]).astype(np.float64).mean() for step in steps]
        assert list(reader.seen) == list(steps)
        np.testing.assert_allclose(list(reader.seen.values()), expected, rtol=2e-5, atol=1e-6)


def test_a_callback_that_does_not_look_leaves_its_window_open():
    data, seen = uneven(9), {}

    def look(info):
        if info.step in (2, 9):
            seen[info.step] = info.metrics["train/loss"]

    trainer(Lambda(on_step=look), Reads(tk.Every(steps=1))).fit(data, epochs=1)
    expected = [np.concatenate(data[:2]).mean(), np.concatenate(data[2:]).mean()]
    np.testing.assert_allclose([seen[2], seen[9]], expected, rtol=1e-5, atol=1e-6)


def test_a_window_can_be_read_later():
    held, data = [], uneven(6)
    trainer(Lambda(every=tk.Every(steps=2), on_step=lambda info: held.append(info.metrics))).fit(
        data, epochs=1
    )
    expected = [np.concatenate(data[start : start + 2]).mean() for start in (0, 2, 4)]
    np.testing.assert_allclose([window["train/loss"] for window in held], expected, rtol=1e-5, atol=1e-6)


def test_what_each_hook_finds_in_metrics():
    found = collections.defaultdict(list)
    hooks = {
        hook: (lambda info, hook=hook: found[hook].append(dict(info.metrics)))
        for hook in HOOKS
        if hook != "on_step"
    }
    made = trainer(Lambda(**hooks))
    made.fit(THREE, epochs=2, eval_data={"a": numbers(5), "b": numbers(6)}, eval_every=tk.Every(steps=4))
    assert found["on_fit_start"] == [{}]
    assert found["on_epoch_start"] == [{}, {}]
    assert found["on_epoch_end"] == [{"train/loss": 2.0}] * 2
    assert found["on_eval_start"] == [{}]
    assert found["on_eval_end"] == [{"a/loss": 5.0, "b/loss": 6.0}]
    assert found["on_fit_end"] == [{"train/loss": 2.0}]
    found.clear()
    # An epoch is told from where this fit took it up: one row for the fit that began it, one for the other.
    made.fit(THREE, steps=2)
    made.fit(THREE, steps=1)
    assert found["on_epoch_end"] == [{"train/loss": 1.5}, {"train/loss": 3.0}]


def test_a_name_that_is_no_metric():
    def look(info):
        with pytest.raises(KeyError, match=r"no metric 'loss' here; the names are train/loss"):
            info.metrics["loss"]
        return True

    assert during(look)


def test_the_same_name_written_twice_at_one_step_names_both():
    class Writes(Callback):
        def on_step(self, info):
            info.writer.write_scalars(info.step, {"norm": 1.0})

    class AlsoWrites(Writes):
        pass

    with pytest.raises(ValueError, match="'norm' was written twice at step 1, by Writes, then by AlsoWrites"):
        trainer(Writes(), AlsoWrites()).fit(TWO, epochs=1)


def test_what_a_callback_writes_is_in_the_history():
    def write(info):
        info.writer.write_scalars(info.step, {"squared": info.step**2})
        return tk.Stop("written") if "squared" in info.history and info.history.last("squared") == 9 else None

    result = trainer(Lambda(on_step=write)).fit(TWO, epochs=9)
    assert result.history["squared"] == [(1, 1.0), (2, 4.0), (3, 9.0)]


def test_the_state_a_fit_returns_is_its_own():
    made = trainer()
    first = made.fit(TWO, epochs=1).state
    kept = jax.device_get(first.params)
    made.fit(TWO, epochs=1)
    assert_same(jax.device_get(first.params), kept)


def test_the_last_step_is_told_before_a_source_that_fails():
    told = []

    def failing():
        yield from numbers(1, 2, 3)
        raise OSError("disk gone")

    made = trainer(Lambda(on_step=lambda info: told.append(info.step)))
    with pytest.raises(OSError, match="disk gone"):
        made.fit(failing, epochs=1)
    assert told == [1, 2, 3]
    assert int(made.state.step) == 3


# Step hooks that guard --------------------------------------------------------------------------------------


class Guards(Callback):
    """Keeps only the updates whose number is not in `refused`; its memory counts all of them."""

    def __init__(self, *refused, name="guard"):
        self.refused, self.name = refused, name

    def step_hook(self):
        def admit(memory, values):
            return ~jnp.isin(values.state.step, jnp.asarray(self.refused, jnp.int32))

        return StepHook(self.name, lambda state: jnp.int32(0), lambda memory, values: memory + 1, admit)


class Own(NetTrainer):
    def train_step(self, state, batch):
        return super().train_step(state, batch)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(NetTrainer, {}, id="plain"),
        pytest.param(NetTrainer, {"accumulate": 2}, id="accumulated"),
        pytest.param(NetTrainer, {"precision": "float16"}, id="float16"),
        pytest.param(NetTrainer, {"strategy": "vmap"}, id="vmap"),
        pytest.param(Own, {}, id="own step"),
    ],
)
def test_an_update_refused_leaves_all_but_the_step_and_the_memory_of_the_guard(kind, options):
    log = tk.callbacks.LogMetrics(every=tk.Every(steps=2))
    rate = 0.0 if options.get("strategy") == "vmap" else 0.3
    model = Net(rate=rate, axis_name="batch" if options.get("strategy") == "vmap" else None)
    made = kind(model, optax.adam(1e-2), callbacks=[Guards(2, 3), tk.callbacks.EMA(0.9), log], **options)
    size = options.get("accumulate", 1)
    data = batches(4 * size)
    before = jax.device_get(made.fit(data[:size], epochs=1).state)
    refused = made.fit(data[size : 3 * size], epochs=1)
    after = jax.device_get(refused.state)
    assert int(after.step) == refused.step == 3
    assert int(after.hooks["guard"]) == 3
    fields = {"step": 1, "hooks": {**before.hooks, "guard": 1}}
    assert_same(after.replace(**fields), before.replace(**fields))
    # Metrics of steps that were not kept are not in the log.
    assert np.isnan(refused.history.last("train/loss"))
    moved = jax.device_get(made.fit(data[3 * size :], epochs=1).state)
    assert np.isfinite(made.history.last("train/loss"))
    assert np.any(moved.params["Dense_0"]["kernel"] != after.params["Dense_0"]["kernel"])
    assert int(moved.hooks["ema"].count) == 2


def test_every_guard_must_admit():
    guards = [Guards(1, name="first"), Guards(3, name="second")]
    made = NetTrainer(Net(), optax.adam(1e-2), callbacks=guards)
    state = made.fit(batches(4), epochs=1).state
    assert int(state.opt_state[0].count) == 2
    assert (int(state.hooks["first"]), int(state.hooks["second"])) == (4, 4)


def test_without_a_guard_nothing_is_chosen(monkeypatch):
    monkeypatch.setattr(
        trainkit._step.steps, "settle", raising(AssertionError("an update was put to a vote"))
    )
    monkeypatch.setattr(trainkit._step.steps, "select", raising(AssertionError("two states were held")))
    NetTrainer(Net(), optax.adam(1e-2), callbacks=[tk.callbacks.EMA(0.9)]).fit(batches(1), epochs=1)


def test_what_a_step_hook_is_told():
    told = {}

    class Looks(Callback):
        def step_hook(self):
            def update(memory, values):
                told.update(has_loss=values.has_loss, grads=values.grads is not None)
                return jnp.stack([values.before.step, values.state.step])

            return StepHook("looks", lambda state: jnp.zeros(2, jnp.int32), update)

    class Silent(tk.Trainer):
        metrics = flax.struct.dataclass(type("None_", (clu.metrics.Collection,), {"__annotations__": {}}))

        def loss(self, model, batch, ctx):
            return model(batch["x"], train=ctx.train).sum(axis=-1), {}

        def train_step(self, state, batch):
            return state, {}

    state = NetTrainer(Net(), optax.sgd(0.1), callbacks=[Looks()]).fit(batches(3), epochs=1).state
    assert (told, state.hooks["looks"].tolist()) == ({"has_loss": True, "grads": True}, [2, 3])
    Silent(Net(), optax.sgd(0.1), callbacks=[Looks()]).fit(batches(1), epochs=1)
    assert told == {"has_loss": False, "grads": False}
