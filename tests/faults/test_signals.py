"""SIGTERM, SIGHUP and Ctrl-C at every phase of a fit: it saves and ends, and the next run does the rest."""

import logging
import os
import signal
import threading
import time

import numpy as np
import optax
import pytest

import trainkit.checkpoint._orbax
from tests.faults.kill import campaign
from tests.faults.small import STEPS, check_whole, fit, make, steps
from tests.helpers.processes import start_and_wait
from tests.helpers.weight import Weight, WeightTrainer, numbers, trainer
from trainkit._loop import interrupts
from trainkit.callbacks import Callback, Checkpoint, Lambda
from trainkit.writers import NullWriter


def send(name, times):
    fit = signal.getsignal(signal.Signals[name]).__self__
    for _ in range(times):
        os.kill(os.getpid(), signal.Signals[name])
        # Two signals that nobody has looked at are one.
        while fit.noted is None:
            time.sleep(0.001)


def each_step(info):
    """Has every step be a call of its own, which is what a signal lets end."""


class Remembers(Callback):
    """Sends when it is asked what it remembers for the third time, which is part of saving step 6."""

    def __init__(self, act):
        self._act, self._left = act, 3

    def on_step(self, info):
        each_step(info)

    def state_dict(self):
        self._left -= 1
        if not self._left:
            self._act()
        return {}


def at(hook, step, act):
    return Lambda(**{hook: lambda info: act() if info.step == step else None})


# Phase, the callback that sends, and the step at which the fit ends.
PHASES = {
    "begin": (lambda act: Lambda(on_fit_start=lambda info: act(), on_step=each_step), 1),
    "training": (lambda act: at("on_step", 7, act), 7),
    "evaluation": (lambda act: at("on_eval_start", 5, act), 5),
    "after an evaluation": (lambda act: at("on_eval_end", 5, act), 5),
    "saving": (Remembers, 7),  # looked at after the next step
    "end of a pass": (lambda act: Lambda(on_epoch_end=lambda info: act()), STEPS),
    "end of the fit": (lambda act: Lambda(on_fit_end=lambda info: act()), STEPS),
    "closing": (lambda act: Lambda(close=act), STEPS),
}


@pytest.fixture
def handlers():
    """Fails where a fit leaves other handlers behind than it found."""
    ours = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(one) for one in ours]
    yield
    assert [signal.getsignal(one) for one in ours] == before


@pytest.mark.parametrize(
    ("phase", "name"),
    [
        *((phase, "SIGTERM") for phase in PHASES),
        ("training", "SIGINT"),
        ("training", "SIGHUP"),
        ("closing", "SIGINT"),
    ],
)
def test_a_signal_saves_and_ends_the_fit(tmp_path, handlers, phase, name):
    sender, step = PHASES[phase]
    result = fit(make(tmp_path, sender(lambda: send(name, 1))))
    assert (result.step, result.stopped_by) == (step, name)
    assert steps(tmp_path)[-1] == step
    check_whole(tmp_path, fit(make(tmp_path, Lambda(), Remembers(lambda: None))))


@pytest.mark.parametrize(("hook", "step"), [("on_eval_start", 5), ("on_step", STEPS)])
def test_what_one_signal_leaves_owed_another_leaves_owed_too(tmp_path, handlers, hook, step):
    # An evaluation, and the end of the pass.
    assert fit(make(tmp_path, at(hook, step, lambda: send("SIGTERM", 1)))).step == step
    again = Lambda(on_fit_start=lambda info: send("SIGTERM", 1))
    for _ in range(2):
        result = fit(make(tmp_path, again))
        assert (result.step, result.stopped_by) == (step, "SIGTERM")
    check_whole(tmp_path, fit(make(tmp_path, Lambda())))


@pytest.mark.parametrize("phase", PHASES)
def test_a_second_ctrl_c_ends_the_fit_at_once_and_loses_nothing_saved(tmp_path, handlers, phase):
    sender, step = PHASES[phase]
    closed = []
    made = make(tmp_path, Lambda(close=lambda: closed.append(True)), sender(lambda: send("SIGINT", 2)))
    with pytest.raises(KeyboardInterrupt):
        fit(made)
    assert closed == [True]
    folder = tmp_path / "checkpoints"
    saved = steps(tmp_path) if folder.exists() else []
    last = {"saving": 4, "end of the fit": STEPS, "closing": STEPS}.get(phase, step - 1)
    assert saved == list(range(2, last + 1, 2))[-3:]
    check_whole(tmp_path, fit(make(tmp_path, Lambda(), Lambda(), Remembers(lambda: None))))


class SendsWhereTraced(WeightTrainer):
    """Sends the process a signal while its training step is traced, once."""

    act = None

    def loss(self, model, batch, ctx):
        if ctx.train and self.act is not None:
            act, self.act = self.act, None
            act()
        return super().loss(model, batch, ctx)


@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_while_the_step_is_compiled(tmp_path, handlers, times):
    trained = SendsWhereTraced(
        Weight(), optax.sgd(1.0), callbacks=make(None, Lambda(on_step=each_step))._callbacks, logdir=tmp_path
    )
    trained.init(np.zeros(4, np.float32))
    trained.act = lambda: send("SIGINT", times)
    if times == 1:
        assert (fit(trained).stopped_by, steps(tmp_path)) == ("SIGINT", [1])
    else:
        with pytest.raises(KeyboardInterrupt):
            fit(trained)
    check_whole(tmp_path, fit(make(tmp_path)))


def test_a_signal_between_two_batches_of_an_evaluation(tmp_path, handlers):
    def evaluation():
        yield numbers(7)[0]
        if made:
            send("SIGTERM", 1)
        yield numbers(7)[0]

    made = make(tmp_path)
    fitted = made.fit(numbers(*range(1, STEPS + 1)), epochs=1, eval_data=evaluation, resume=True)
    assert (fitted.step, fitted.stopped_by) == (STEPS, "SIGTERM")
    assert "eval/loss" not in fitted.history
    made = None
    result = make(tmp_path).fit(numbers(*range(1, STEPS + 1)), epochs=1, eval_data=evaluation, resume=True)
    assert (result.step, result.stopped_by, result.history["eval/loss"]) == (STEPS, None, [(STEPS, 7.0)])


@pytest.mark.parametrize(("times", "step"), [(1, 6), (2, 6), (2, STEPS)])
def test_ctrl_c_while_a_checkpoint_is_written_in_the_background(tmp_path, handlers, monkeypatch, times, step):
    listed = trainkit.checkpoint._orbax.write_manifest

    def write_manifest(folder, **options):
        if folder.name.startswith(f"{step}."):
            send("SIGINT", times)
        listed(folder, **options)

    monkeypatch.setattr(trainkit.checkpoint._orbax, "write_manifest", write_manifest)
    if times == 2:
        with pytest.raises(KeyboardInterrupt):
            fit(make(tmp_path))
    else:
        assert fit(make(tmp_path)).stopped_by == "SIGINT"
    # What was begun to be written is written all the same.
    assert step in steps(tmp_path)
    check_whole(tmp_path, fit(make(tmp_path)))


SIGNALLED = """
import sys
from tests.faults.small import fit, make
from trainkit.callbacks import Lambda

def wait(info):
    if info.step == 7:
        print("ready", flush=True)
        sys.stdin.readline()

result = fit(make(sys.argv[1], Lambda(on_step=wait)))
print(result.stopped_by, result.step)
"""


def test_a_signal_from_another_process(tmp_path):
    process = start_and_wait(SIGNALLED, tmp_path)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate("\n", timeout=120)
    assert (process.returncode, stdout) == (0, "SIGTERM 7\n"), stderr
    assert steps(tmp_path)[-1] == 7
    check_whole(tmp_path, fit(make(tmp_path, Lambda())))


SEARCH = """
import pathlib, sys
from tests.faults.small import fit, make
from trainkit.callbacks import Lambda

def wait(info):
    if info.step == 7 and info.logdir.name == "1":
        print("ready", flush=True)
        sys.stdin.readline()

for trial in range(100):
    logdir = pathlib.Path(sys.argv[1], str(trial))
    fit(make(logdir, Lambda(on_step=wait), interrupt="raise"))
"""


def test_one_ctrl_c_ends_a_search_over_trainers_with_everything_saved(tmp_path):
    process = start_and_wait(SEARCH, tmp_path)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate("\n", timeout=120)
    # As of any program that Ctrl-C ended, so that the shell's own loop ends too.
    assert process.returncode == -signal.SIGINT, stderr
    assert stderr.endswith("KeyboardInterrupt: Ctrl-C ended the fit; its result is in .result\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
    assert (steps(tmp_path / "0")[-1], steps(tmp_path / "1")[-1]) == (STEPS, 7)
    for trial in ("0", "1"):
        check_whole(tmp_path / trial, fit(make(tmp_path / trial, Lambda())))


class SendsAtTheVeryEnd(NullWriter):
    """Sends Ctrl-C when it is flushed for the last time, as writers are after everything else."""

    armed = False

    def flush(self):
        if self.armed:
            send("SIGINT", 1)


@pytest.mark.parametrize("options", [{}, {"dry_run": 2}])
def test_ctrl_c_while_writers_close_ends_a_search_too(tmp_path, handlers, options):
    writer = SendsAtTheVeryEnd()
    arm = Lambda(close=lambda: setattr(writer, "armed", True))
    if options:  # of a dry run writers get nothing
        arm = Lambda(close=lambda: send("SIGINT", 1))
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(make(tmp_path, arm, writers=[writer], interrupt="raise", **options))
    assert caught.value.result.stopped_by == "SIGINT"
    assert caught.value.result.step == options.get("dry_run", STEPS)


def test_ctrl_c_while_a_finished_run_is_looked_up_is_not_swallowed(tmp_path, handlers):
    first = trainer(Checkpoint(), logdir=tmp_path)
    for _ in range(2):
        first.fit(numbers(1, 2), epochs=1, resume=True)
    again = trainer(Checkpoint(), logdir=tmp_path, writers=[writer := SendsAtTheVeryEnd()])
    writer.armed = True
    result = again.fit(numbers(1, 2), epochs=1, resume=True)  # the first of two, which is done
    assert (result.step, result.stopped_by) == (4, "SIGINT")


@pytest.mark.parametrize("fits", [1, 3])
def test_a_fit_in_another_thread_says_once_that_it_hears_no_signal(
    tmp_path, handlers, monkeypatch, caplog, fits
):
    monkeypatch.setattr(interrupts, "_warned_of_thread", threading.Event())

    def search():
        for number in range(fits):
            check_whole(tmp_path / str(number), fit(make(tmp_path / str(number))))
        done.append(number)

    done = []
    thread = threading.Thread(target=search, name="search")
    thread.start()
    thread.join()
    assert done == [fits - 1]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for words in ("'search'", "SIGTERM", "SIGUSR1", "main thread", "tk.Save()", "tk.Stop(reason)"):
        assert words in record.getMessage()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_at_random_moments_lose_nothing(tmp_path, number):
    moments = ("compiling", "training", "saving", "evaluating", "closing", "anywhere")
    table = campaign(18, moments, tmp_path, number=number)
    assert not table.lost
    assert table.recovered.total() == 18
