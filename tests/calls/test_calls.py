"""Several steps in one call: the same numbers, the same hooks at the same steps, whatever the calls."""

import itertools
import json
import os
import signal
import threading

import flax
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn

import trainkit as tk
from tests.helpers.compare import assert_same
from tests.helpers.digits import Net, NetTrainer, arrays, batches
from trainkit._calls import tuner as tuning
from trainkit._calls.calls import Calls
from trainkit._calls.choice import SINGLE, Choice, Remembered
from trainkit._engine import cpu_settings
from trainkit._loop import fit as fit_module


class Conv(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3,))(x[..., None])
        return nn.Dense(4)(nn.relu(x).reshape(len(x), -1))


def fitted(model, data, *, steps=None, epochs=None, tx=None, kind=NetTrainer, **options):
    callbacks = [tk.callbacks.EMA(0.9), tk.callbacks.LogMetrics(every=tk.Every(steps=5))]
    trainer = kind(model, tx or optax.adam(1e-2), callbacks=callbacks, **options)
    return trainer, trainer.fit(data, steps=steps, epochs=epochs)


@pytest.fixture
def sizes(monkeypatch):
    """The number of steps of each call, in order."""
    seen, run = [], Calls.__call__

    def spy(self, raw, packed, feds):
        seen.append(len(feds))
        return run(self, raw, packed, feds)

    monkeypatch.setattr(Calls, "__call__", spy)
    return seen


def assert_same_state(got, expected, *, rtol=2e-6, atol=2e-6):
    """Other programs round in another order, by so much; all but the arrays is of another trainer."""
    got, expected = (state.replace(apply_fn=None, tx=None) for state in (got, expected))
    assert_same(got, expected, rtol=rtol, atol=atol)


def assert_equal_runs(got, expected):
    assert_same_state(got.state, expected.state)
    assert got.step == expected.step
    assert got.history.last("train/loss") == pytest.approx(expected.history.last("train/loss"), rel=1e-5)
    assert got.history["train/accuracy"] == expected.history["train/accuracy"]


DATA = {
    "host": batches(11),
    "other shapes between": [*batches(4), *batches(2, rows=8), *batches(5)],
    "padded": tk.data.Arrays(arrays(100), batch_size=16),
}


@pytest.mark.parametrize("name", ["host", "device", "other shapes between", "padded"])
def test_calls_of_several_steps_give_the_numbers_of_single_ones(name, sizes):
    data = DATA.get(name) or [jax.tree.map(jnp.asarray, batch) for batch in batches(11)]
    # Padding needs a loss without batch statistics; the others have those and dropout.
    model = Net(norm=False) if name == "padded" else Net()
    _, expected = fitted(model, data, epochs=2, steps_per_call=1)
    assert set(sizes) == {1}
    sizes.clear()
    trainer, got = fitted(model, data, epochs=2, steps_per_call=4)
    assert max(sizes) == 4
    assert sum(sizes) == got.step
    assert "scanned 4" in trainer.summary()
    assert_equal_runs(got, expected)


def test_steps_with_a_convolution_are_unrolled_on_a_cpu(sizes):
    data = batches(11)
    trainer, got = fitted(Conv(), data, epochs=1, steps_per_call=3)
    assert sizes == [3, 1, 1, 3, 1, 1, 1]  # logs are due at steps 5 and 10
    assert "unrolled 3" in trainer.summary()
    assert_equal_runs(got, fitted(Conv(), data, epochs=1, steps_per_call=1)[1])


def test_accumulated_gradients(sizes):
    data = batches(14, rows=8)  # by threes, with a tail of two
    model = Net(norm=False)
    _, got = fitted(model, data, epochs=2, accumulate=3, steps_per_call=2)
    assert max(sizes) == 2
    assert_equal_runs(got, fitted(model, data, epochs=2, accumulate=3, steps_per_call=1)[1])


class Own(NetTrainer):
    def train_step(self, state, batch):
        def objective(params):
            logits = state.apply_fn({"params": params}, batch["x"], train=False)
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean(), logits

        (loss, logits), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        outputs = {"loss": loss, "logits": logits, "labels": batch["y"]}
        return state.apply_gradients(grads=grads), outputs


def test_a_train_step_of_ones_own(sizes):
    model, data = Net(norm=False), batches(9)
    _, got = fitted(model, data, epochs=1, kind=Own, steps_per_call=4)
    assert max(sizes) == 4
    assert_equal_runs(got, fitted(model, data, epochs=1, kind=Own, steps_per_call=1)[1])


class Settling(nn.Module):
    """Gives its statistic another shape at the first step, from [8] to [1, 8]."""

    @nn.compact
    def __call__(self, x, train):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[1:])
        if train and not self.is_initializing():
            mean.value = 0.9 * mean.value + 0.1 * x.mean(axis=0, keepdims=True)
        return nn.Dense(4)(x - mean.value)


def test_a_shape_that_settles_at_the_first_step_has_its_pass_run_single_steps(sizes):
    data = batches(4)
    with jax.numpy_rank_promotion("allow"):
        _, got = fitted(Settling(), data, epochs=3, steps_per_call=2)
        assert sizes == [1, 1, 1, 1, 1, 2, 1, 2, 2]  # logs are due at steps 5 and 10
        assert_equal_runs(got, fitted(Settling(), data, epochs=3, steps_per_call=1)[1])


class Frozen(NetTrainer):
    def init_variables(self, rng, batch):
        return flax.core.freeze(super().init_variables(rng, batch))


def test_frozen_dicts_stay_frozen(sizes):
    data = batches(4)
    _, got = fitted(Net(), data, epochs=2, kind=Frozen, steps_per_call=4)
    assert sizes == [4, 1, 3]
    assert isinstance(got.state.batch_stats, flax.core.FrozenDict)
    assert_equal_runs(got, fitted(Net(), data, epochs=2, kind=Frozen, steps_per_call=1)[1])


class Scaled(NetTrainer):
    def loss(self, model, batch, ctx):
        losses, outputs = super().loss(model, batch, ctx)
        return losses * batch["scale"], outputs


def test_python_numbers_in_a_batch_leave_its_step_alone(sizes):
    data = [{**batch, "scale": 0.5} for batch in batches(4)]
    fitted(Net(), data, epochs=1, kind=Scaled, steps_per_call=4)
    assert set(sizes) == {1}


def test_hooks_run_at_their_steps_with_the_metrics_of_those_steps():
    def told(steps_per_call):
        seen = []
        spy = tk.callbacks.Lambda(
            on_step=lambda info: seen.append((info.step, info.epoch, info.metrics["train/loss"])),
            every=tk.Every(steps=3),
        )
        at = tk.callbacks.Lambda(on_step=lambda info: seen.append(("at", info.step)), every=tk.At((2, 16)))
        trainer = NetTrainer(Net(), optax.sgd(0.1), callbacks=[spy, at], steps_per_call=steps_per_call)
        trainer.fit(batches(7), epochs=3, eval_data=batches(1), eval_every=tk.Every(steps=10))
        return seen

    expected, got = told(1), told(5)
    assert [one[:2] for one in got] == [one[:2] for one in expected]
    losses = [one[2] for one in expected if len(one) == 3]
    assert [one[2] for one in got if len(one) == 3] == pytest.approx(losses, rel=1e-5)


def test_calls_depend_on_the_step_alone(sizes):
    data = tk.data.Arrays(arrays(), batch_size=4, shuffle=True)
    _, expected = fitted(Net(), data, steps=40, steps_per_call=4)
    whole = list(sizes)
    sizes.clear()
    trainer, _ = fitted(Net(), data, steps=sum(whole[:7]), steps_per_call=4)
    got = trainer.fit(data, steps=40 - sum(whole[:7]))
    assert sizes == whole
    assert_same_state(got.state, expected.state, rtol=0, atol=0)


def test_a_source_that_fails_within_a_call_loses_no_step():
    data = batches(12)
    calls = iter([6, 12])

    def failing(epoch):
        yield from data[: next(calls)]
        raise OSError("the disk is gone")

    trainer = NetTrainer(Net(), optax.sgd(0.1), steps_per_call=4)
    with pytest.raises(OSError, match="disk is gone"):
        trainer.fit(failing, epochs=1)
    assert int(trainer.state.step) == 6
    expected = NetTrainer(Net(), optax.sgd(0.1), steps_per_call=1).fit(data[:6], epochs=1)
    assert_same_state(trainer.state, expected.state)
    with pytest.raises(OSError, match="disk is gone"):
        trainer.fit(failing, epochs=1)
    # It went on behind the sixth batch.
    expected = NetTrainer(Net(), optax.sgd(0.1), steps_per_call=1).fit(data, epochs=1)
    assert_same_state(trainer.state, expected.state)


def test_a_signal_waits_for_one_call_and_the_next_fit_goes_on():
    data = batches(24)

    class Killing(tk.data.Source):
        steps_per_epoch, seekable, may_be_partial = 24, True, False

        def batches(self, epoch, start=0):
            for index in range(start, 24):
                if index == 9 and not start:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield data[index]

    source, trainer = Killing(), NetTrainer(Net(), optax.sgd(0.1), steps_per_call=8)
    stopped = trainer.fit(source, epochs=1)
    assert stopped.stopped_by == "SIGTERM"
    assert stopped.step == 16
    trainer.fit(source, epochs=1)
    expected = NetTrainer(Net(), optax.sgd(0.1), steps_per_call=1).fit(data, epochs=1)
    assert_same_state(trainer.state, expected.state)


# "auto" -------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class FakePrograms:
    """Programs of given speeds."""

    platform, any_size, bytes, convolves = "cpu", True, 1000, False

    def lower(self, choice):
        return choice

    def compile(self, choice, lowered=None):
        return lambda raw, packed, feds: (raw, packed)


def race(tuner, clock, speeds, *, first=1.0, steps=100_000):
    """Runs steps at the `speeds` of the choices until there is a choice; returns how many and how long it took."""
    tuner.expect(steps)
    tuner.resume()
    done = 0
    while tuner.choice is None and done < steps:
        size = tuner.current.room(50, any_size=True)
        clock.now += first if not done else size * speeds[tuner.current]
        done += size
        tuner.ran(size, None)
        if tuner._thread is not None:
            tuner._thread.join()
    return done, clock.now - first


def new_tuner(**options):
    clock = Clock()
    return tuning.Tuner(FakePrograms(), cpu_settings=True, clock=clock, **options), clock


SCANNED = Choice("scanned", 50)
SPEEDS = {
    SINGLE: 1e-4,
    SCANNED: 3e-5,
    Choice("scanned", 50, "memory"): 4e-5,
    Choice(scheduler="memory"): 6e-5,
}


@pytest.mark.parametrize("fastest", SPEEDS)
def test_auto_takes_what_is_fastest_within_a_second(fastest):
    tuner, clock = new_tuner()
    _, seconds = race(tuner, clock, {**SPEEDS, fastest: 2e-5})
    assert tuner.choice == tuner.current == fastest
    assert seconds < 1
    assert set(tuner.runs) <= {fastest}


def test_auto_stays_with_single_steps_where_nothing_gains():
    tuner, clock = new_tuner()
    race(tuner, clock, dict.fromkeys(SPEEDS, 1e-4))
    assert tuner.choice == SINGLE
    slow, clock = new_tuner()
    steps, _ = race(slow, clock, {SINGLE: 2.0})
    assert slow.choice == SINGLE
    assert steps <= 20


def test_auto_measures_large_steps_in_few_of_them():
    tuner, clock = new_tuner()
    unrolled = Choice("unrolled", 4)
    steps, _ = race(tuner, clock, {SINGLE: 0.09, unrolled: 0.08, Choice("scanned", 5): 0.2})
    assert tuner.choice == unrolled
    assert steps <= 30


def test_auto_compiles_nothing_for_a_fit_that_ends_before_it_would_pay():
    tuner, clock = new_tuner()
    race(tuner, clock, SPEEDS, steps=6_000)  # 0.6 s of steps, and 1 s to compile
    assert tuner.choice is None
    assert not tuner.runs
    race(tuner, clock, SPEEDS, steps=6_000, first=0.0)  # but a second fit shows that it goes on
    assert tuner.choice is not None


def test_what_the_host_does_between_steps_is_not_counted():
    tuner, clock = new_tuner()
    tuner.expect(1e6)
    tuner.resume()
    while tuner.choice is None:
        clock.now += SPEEDS[tuner.current] * tuner.current.size
        tuner.ran(tuner.current.size, None)
        if tuner._thread is not None:
            tuner._thread.join()
        if tuner.choice is None:
            tuner.pause()
            clock.now += 3.0 if tuner.current == SCANNED else 0.0
            tuner.resume()
    assert tuner.choice == SCANNED


def test_candidates():
    def found(seconds, convolves=False, size=1000, platform="cpu"):
        found = tuning.candidates(seconds, size, platform, convolves=convolves, cpu_settings=False)
        return {*map(str, found)}

    assert found(1e-4) == {"scanned 50"}
    assert found(1e-4, convolves=True) == {"unrolled 4"}
    assert found(1e-2) == {"scanned 50", "unrolled 4"}
    assert found(0.03, convolves=True) == {"unrolled 4"}
    assert found(0.2, convolves=True) == {"unrolled 2"}  # no more than half a second of work
    assert found(0.3) == found(1e-2, platform="gpu") == set()
    assert found(1e-4, size=2**20) == {"scanned 16"}  # no more than 16 MiB of batches
    assert found(1e-4, convolves=True, platform="gpu") == {"scanned 50"}


class Inline:
    """A thread that has ended when it has started, so that the number of steps does not depend on the machine."""

    def __init__(self, target, args=(), name=""):
        self.start = lambda: target(*args)

    def is_alive(self):
        return False


def test_auto_in_a_fit(auto, monkeypatch, tmp_path, sizes):
    monkeypatch.setattr(tuning.threading, "Thread", Inline)
    for name, value in {"_WINDOW": 0.0, "_ROUNDS": 1, "_MOST_STEPS": 6}.items():
        monkeypatch.setattr(tuning, name, value)
    data = batches(5)  # shorter than a call

    def run(limit, **options):
        def enough(info):
            return tk.Stop("chosen") if trainer._engine._last_calls.choice not in (None, given) else None

        given = SINGLE if options else None
        watch = tk.callbacks.Lambda(on_step=enough, every=tk.Every(steps=10))
        trainer = NetTrainer(Net(), optax.sgd(1e-2), callbacks=[watch, tk.callbacks.EMA(0.9)], **options)
        return trainer, trainer.fit(data, steps=limit)

    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    trainer, got = run(limit=10**7)
    choice = trainer._engine._last_calls.choice
    assert got.stopped_by == "chosen"
    assert max(sizes) > 1
    (kept,) = tmp_path.glob("trainkit-call-*.json")
    assert f'"{choice}"' in kept.read_text()
    # The second start takes it up at its first call.
    again, _ = run(limit=20)
    assert again._engine._last_calls.choice == choice
    _, expected = run(limit=got.step, steps_per_call=1)
    assert got.step < 200
    assert_same_state(got.state, expected.state, rtol=1e-5, atol=1e-5)


def test_remembered_choices(tmp_path):
    kept = Remembered(tmp_path, "program", "cpu")
    assert kept.load() is None
    kept.store(SCANNED, {"single": 1.0})
    assert kept.load() == SCANNED
    assert Remembered(tmp_path, "another", "cpu").load() is None
    (file,) = tmp_path.iterdir()
    for broken in ("", "[]", '{"choice": "scanned many"}', '{"choice": 3}', "[" * 50_000, " " * 10**6 + "{}"):
        file.write_text(broken)
        assert kept.load() is None
    file.unlink()
    os.mkfifo(file)
    assert kept.load() is None
    Remembered(None, "program").store(SCANNED, {})


def test_what_was_read_is_taken_only_where_it_might_have_been_measured():
    def taken(text, size=1000, platform="cpu", convolves=False, cpu_settings=True):
        found = Choice.recall(text)
        return found is not None and tuning.is_candidate(
            found, size, platform, convolves=convolves, cpu_settings=cpu_settings
        )

    assert all(map(taken, ("single", "scanned 50", "scanned 7 memory", "unrolled 4", "single memory")))
    assert not taken("scanned 51")
    assert not taken("unrolled 5")
    assert not taken("scanned 2", convolves=True)
    assert not taken("scanned 17", size=2**20)
    assert taken("scanned 16", size=2**20)
    assert taken("single", size=2**40)
    assert not taken("single memory", cpu_settings=False)
    assert taken("scanned 50", platform="gpu", convolves=True)
    assert not taken("unrolled 2", platform="gpu")
    # Whatever may be measured may be taken up.
    for seconds, size in itertools.product((1e-5, 1e-3, 4e-3, 0.1, 3.0), (1, 2**20, 2**30)):
        for case in itertools.product(("cpu", "gpu"), (False, True), (False, True)):
            platform, options = case[0], dict(zip(("convolves", "cpu_settings"), case[1:], strict=True))
            for choice in tuning.candidates(seconds, size, platform, **options):
                assert tuning.is_candidate(choice, size, platform, **options)


@pytest.mark.parametrize("text", ["unrolled 1000000", "scanned 1000000", "nonsense"])
def test_an_absurd_number_of_steps_in_a_checkpoint_is_ignored(auto, sizes, text):
    trainer = NetTrainer(Net(), optax.sgd(0.1))
    begin = Calls.begin
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Calls, "begin", lambda self, given, *rest: begin(self, Choice.recall(text), *rest))
        trainer.fit(batches(4), epochs=1)
    assert set(sizes) == {1}


@pytest.mark.parametrize("text", ["unrolled 1000000", "scanned 1000000"])
def test_an_absurd_number_of_steps_that_is_remembered_is_ignored(auto, sizes, tmp_path, monkeypatch, text):
    monkeypatch.setattr(Remembered, "load", lambda self: Choice.recall(text))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    NetTrainer(Net(), optax.sgd(0.1)).fit(batches(4), epochs=1)
    assert set(sizes) == {1}


def test_a_remembered_choice_is_not_read_or_written_through_a_link(tmp_path):
    folder, outside = tmp_path / "cache", tmp_path / "outside"
    kept = Remembered(folder, "program", "cpu")
    kept.store(SCANNED, {})
    (file,) = folder.iterdir()
    file.rename(outside)
    file.symlink_to(outside)
    assert kept.load() is None
    kept.store(SINGLE, {})
    assert Choice.parse(json.loads(outside.read_text())["choice"]) == SCANNED


def test_a_choice_is_its_text():
    for choice in (
        SINGLE,
        Choice("unrolled", 4),
        Choice("scanned", 50, "memory"),
        Choice(scheduler="memory"),
    ):
        assert Choice.parse(str(choice)) == choice
    for text in ("scanned", "double 3", "single 2", "unrolled x", "scanned 4 5"):
        with pytest.raises(ValueError, match=r"choice|kind|size"):
            Choice.parse(text)


def test_a_choice_that_is_given_is_not_measured(auto, sizes):
    trainer = NetTrainer(Net(), optax.sgd(0.1))
    trainer.fit(batches(4), epochs=1)
    begin = Calls.begin
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Calls, "begin", lambda self, given, *rest: begin(self, Choice("scanned", 4), *rest))
        trainer.fit(batches(8), epochs=1)
    assert sizes[-2:] == [4, 4]
    assert trainer._engine._last_calls.choice == Choice("scanned", 4)


# Compiled ahead -----------------------------------------------------------------------------------------------


def test_what_a_thread_compiles_ahead_is_not_compiled_again(monkeypatch):
    programs, threads = [], set()

    def note(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration" and duration > 0:
            programs.append(event)
            threads.add(threading.current_thread().name)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        runs = {}
        for ahead in (False, True):
            monkeypatch.setattr(fit_module, "arena_is_shared", lambda ahead=ahead: not ahead)
            jax.clear_caches()
            programs.clear()
            threads.clear()
            data = tk.data.Arrays(arrays(64), 16)
            trainer = NetTrainer(Net(), optax.sgd(0.1), steps_per_call=1)
            runs[ahead] = trainer.fit(data, epochs=2, eval_data=data).state, len(programs)
            assert ("trainkit-compile" in threads) == ahead
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert runs[True][1] == runs[False][1]
    assert_same_state(runs[True][0], runs[False][0], rtol=0, atol=0)


# Arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "fast", None])
def test_steps_per_call_is_refused_unless_it_is_auto_or_a_positive_int(wrong):
    with pytest.raises(ValueError, match="steps_per_call="):
        NetTrainer(Net(), optax.sgd(0.1), steps_per_call=wrong)


class Libc:
    """Records what is set."""

    def __init__(self):
        self.settings = []

    def mallopt(self, parameter, value):
        self.settings.append((parameter, value))
        return 1


@pytest.fixture
def glibc(monkeypatch):
    """A C library that records what is set, in a process where nothing was set before."""
    libc = Libc()
    monkeypatch.setattr(cpu_settings.ctypes, "CDLL", lambda name: libc)
    monkeypatch.setattr(cpu_settings.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(cpu_settings.sys, "platform", "linux")
    for name in ("_kept", "_one_arena"):
        monkeypatch.setattr(cpu_settings, name, False)
    return libc


def test_the_allocator_is_set_once_and_off_by_argument_and_environment(monkeypatch, glibc):
    data = batches(2)
    off = NetTrainer(Net(), optax.sgd(0.1), cpu_settings=False)
    off.fit(data, epochs=1)
    monkeypatch.setenv("TRAINKIT_CPU_SETTINGS", "0")
    NetTrainer(Net(), optax.sgd(0.1)).fit(data, epochs=1)
    assert glibc.settings == []
    assert "as it was" in off.summary()
    monkeypatch.delenv("TRAINKIT_CPU_SETTINGS")
    trainer = NetTrainer(Net(), optax.sgd(0.1))
    trainer.fit(data, epochs=2)
    trainer.fit(data, epochs=1)
    assert sorted(glibc.settings) == [(-3, 1 << 30), (-1, 2**31 - 1)]
    assert "keeps freed memory\n" in f"{trainer.summary()}\n"
    monkeypatch.setattr(cpu_settings, "_kept", False)
    monkeypatch.setattr(cpu_settings.platform, "libc_ver", lambda: ("", ""))
    assert not cpu_settings.keep_freed_memory()
    assert len(glibc.settings) == 2
