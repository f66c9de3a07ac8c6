"""SIGUSR1 at every phase of a fit: it saves and goes on, and the run ends as one that nothing happened to."""

import logging
import os
import pathlib
import signal
import subprocess
import sys

import optax
import pytest

import trainkit as tk
from tests.faults.kill import ROOT
from tests.faults.small import STEPS, check_whole, fit, make, steps
from tests.helpers.digits import Net, NetTrainer, arrays
from tests.helpers.runs import assert_equal, dies_at, scalars_of
from tests.helpers.weight import numbers, trainer
from trainkit.callbacks import Callback, Checkpoint, Lambda, LogMetrics

OURS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def send(name="SIGUSR1", times=1):
    """Sends this process a signal; the handler is run before the next line of Python is."""
    for _ in range(times):
        os.kill(os.getpid(), signal.Signals[name])


def each_step(info):
    """Has every step be a call of its own, which is what a signal lets end."""


def at(hook, step):
    return Lambda(**{hook: lambda info: send() if info.step == step else None})


class Remembers(Callback):
    """Sends when it is asked what it remembers for the first time, which is part of saving step 7."""

    asked = 0

    def on_step(self, info):
        if info.step == 7:
            send()

    def state_dict(self):
        self.asked += 1
        if self.asked == 2:  # before the fit it was asked what it begins with
            send()
        return {}

    def load_state_dict(self, state):
        pass


# Phase, the callback that sends, and the steps saved, the last one because the fit ends there.
PHASES = {
    "begin": (lambda: Lambda(on_fit_start=lambda info: send()), [1, STEPS]),
    "training": (lambda: at("on_step", 7), [7, STEPS]),
    "evaluation": (lambda: at("on_eval_start", 5), [5, STEPS]),
    "after an evaluation": (lambda: at("on_eval_end", 5), [5, STEPS]),
    "saving": (Remembers, [7, 8, STEPS]),
    "end of a pass": (lambda: Lambda(on_epoch_end=lambda info: send()), [STEPS]),
    "end of the fit": (lambda: Lambda(on_fit_end=lambda info: send()), [STEPS]),
    "closing": (lambda: Lambda(close=send), [STEPS]),
}


def make_unasked(logdir, *extra):
    """Returns the trainer of `make`, except that it saves when it is asked and at its end only."""
    made = make(logdir, *extra, Lambda(on_step=each_step))
    made._callbacks = [*made._callbacks[:-1], Checkpoint(tk.Never(), keep=None)]
    return made


@pytest.fixture
def handlers():
    """Fails where a fit leaves other handlers behind than it found."""
    before = [signal.getsignal(one) for one in OURS]
    yield
    assert [signal.getsignal(one) for one in OURS] == before


@pytest.mark.parametrize("phase", PHASES)
def test_it_saves_and_goes_on(tmp_path, handlers, phase):
    sender, saved = PHASES[phase]
    check_whole(tmp_path, fit(make_unasked(tmp_path, sender())))
    assert steps(tmp_path) == saved


def test_between_two_batches_of_an_evaluation(tmp_path, handlers):
    def evaluation():
        yield numbers(7)[0]
        send()
        yield numbers(7)[0]

    made = make_unasked(tmp_path)
    result = made.fit(numbers(1, 2, 3, 4), epochs=1, eval_data=evaluation, eval_every=tk.Every(steps=3))
    assert (result.stopped_by, result.history["eval/loss"]) == (None, [(3, 7.0)])
    assert steps(tmp_path) == [3, 4]


def test_two_at_one_step_are_one_save_and_where_one_is_due_it_is_the_same(tmp_path):
    twice = Lambda(on_step=lambda info: send(times=2) if info.step in (3, 6) else None)
    made = make(tmp_path, twice)
    saves, save = [], Checkpoint.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Checkpoint, "save", lambda self, step, make: (saves.append(step), save(self, step, make))
        )
        check_whole(tmp_path, fit(made))
    assert saves == [2, 3, 4, 6, 8, 10, STEPS]


def test_every_checkpoint_callback_saves(tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    keepers = [Checkpoint(tk.Never(), folder=folder) for folder in folders]
    trainer(*keepers, at("on_step", 2)).fit(numbers(1, 2, 3, 4), epochs=1)
    assert [[info.step for info in tk.checkpoint.list(folder)] for folder in folders] == [[2, 4], [2, 4]]


def test_a_run_that_dies_later_goes_on_from_there(tmp_path):
    with pytest.raises(ConnectionError):
        fit(make_unasked(tmp_path, at("on_step", 7), dies_at(9)))
    assert steps(tmp_path) == [7]
    check_whole(tmp_path, fit(make_unasked(tmp_path, Lambda(), Lambda())))


def test_calls_of_several_steps_are_divided_as_before_and_not_a_bit_differs(tmp_path):
    rows = arrays()

    def batches(signalled):
        for index in range(13):
            if index in signalled:
                send()
            yield {name: leaf[4 * index : 4 * index + 4] for name, leaf in rows.items()}

    states = []
    for name, signalled in (("whole", ()), ("signalled", (1, 6))):
        made = NetTrainer(
            Net(),
            optax.adam(1e-2),
            logdir=tmp_path / name,
            steps_per_call=4,
            callbacks=[
                tk.callbacks.EMA(0.9),
                LogMetrics(tk.Every(steps=13)),
                Checkpoint(tk.Never(), keep=None),
            ],
        )
        states.append(made.fit(lambda signalled=signalled: batches(signalled), epochs=1).state)
    assert_equal(*states)
    assert scalars_of(tmp_path / "signalled") == scalars_of(tmp_path / "whole")
    assert steps(tmp_path / "signalled") == [4, 8, 13]


def test_without_a_checkpoint_that_is_said_once_a_fit(tmp_path, caplog):
    twice = Lambda(on_step=lambda info: send() if info.step in (3, 6) else None)
    result = trainer(twice).fit(numbers(*range(1, 9)), epochs=1)
    assert (result.step, result.stopped_by) == (8, None)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "SIGUSR1: nothing was saved, for this fit has no tk.callbacks.Checkpoint(). It goes on."
    )


# Whose signal it is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGHUP"])
def test_a_handler_of_the_users_own_is_left_alone(tmp_path, name):
    heard = []
    before = signal.signal(signal.Signals[name], lambda *_: heard.append(name))
    try:
        made = make_unasked(tmp_path, Lambda(on_step=lambda info: send(name) if info.step == 7 else None))
        check_whole(tmp_path, fit(made))
    finally:
        signal.signal(signal.Signals[name], before)
    assert heard == [name]
    assert steps(tmp_path) == [STEPS]


# Said in the same words by each program; the test says what it is sent, and how it was started.
PROGRAM = """
import os, signal, sys
from tests.faults.small import fit, make
from trainkit.callbacks import Lambda, Progress

def wait(info):
    if info.step == 7:
        os.write(int(sys.argv[2]), b"ready")
        os.read(int(sys.argv[3]), 1)

result = fit(make(sys.argv[1], Lambda(on_step=wait), Progress()))
os.write(int(sys.argv[2]), f"{result.stopped_by} {result.step}".encode())
"""


@pytest.fixture
def program(tmp_path):
    """A function that starts a program and waits until it trains; it returns the process and what it says next."""
    started, pipes = [], [*os.pipe(), *os.pipe()]
    hears, says, waits, wakes = pipes

    def start(*before, **options):
        command = [*before, sys.executable, "-c", PROGRAM, tmp_path, str(says), str(waits)]
        process = subprocess.Popen(command, cwd=ROOT, pass_fds=(says, waits), **options)
        started.append(process)
        assert os.read(hears, 5) == b"ready"

        def go_on():
            os.write(wakes, b".")
            assert process.wait(timeout=120) == 0
            return os.read(hears, 100).decode()

        return process, go_on

    yield start
    for process in started:
        process.kill()
        process.wait()
    for pipe in pipes:
        os.close(pipe)


def test_what_nohup_has_ignored_stays_ignored(tmp_path, program):
    process, go_on = program("nohup", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process.send_signal(signal.SIGHUP)
    assert go_on() == f"None {STEPS}"


def test_a_terminal_that_is_closed_ends_the_fit_in_order(tmp_path, program):
    ours, theirs = os.openpty()
    # setsid makes the terminal that of the process, which the kernel tells when it is gone.
    _, go_on = program("setsid", "--ctty", stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.close(ours)
    assert go_on() == "SIGHUP 7"
    assert steps(pathlib.Path(tmp_path))[-1] == 7
    check_whole(tmp_path, fit(make(tmp_path, Lambda(), Lambda())))
