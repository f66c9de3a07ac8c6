"""Killed, interrupted and failing runs, for real: what was logged is there, and everything is closed."""

import signal
import subprocess
import sys

import numpy as np
import pytest

import trainkit as tk
from tests.helpers.weight import numbers, trainer
from tests.helpers.writer_calls import events
from trainkit.callbacks import Lambda, LogMetrics
from trainkit.writers import NullWriter, read_jsonl

# The loss at step n is n, so that every row tells whether it is the right one.
PRELUDE = """
import itertools, os, signal, sys
import trainkit as tk
from tests.helpers.weight import numbers, trainer
from trainkit.callbacks import Lambda, LogMetrics

def endless():
    return (numbers(step)[0] for step in itertools.count(1))
"""


@pytest.fixture
def start():
    """A function that starts a program; what still runs after the test is killed."""
    started = []

    def begin(code, *args):
        command = [sys.executable, "-c", PRELUDE + code, *map(str, args)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield begin
    for process in started:
        with process:
            process.kill()


def logged(folder, name):
    """The `(step, value)` rows of a name, which both logs must agree on."""
    tensorboard = [(event.step, event.value) for event in events(folder).Scalars(name)]
    lines = read_jsonl(folder / "metrics.jsonl")
    jsonl = [(line["step"], line["scalars"][name]) for line in lines if name in line.get("scalars", {})]
    assert jsonl == tensorboard
    return tensorboard


def means(*ends):
    """Rows at the steps `ends` over the steps since the one before."""
    return [(end, np.arange(begin + 1, end + 1).mean()) for begin, end in zip((0, *ends), ends, strict=False)]


def test_a_killed_fit_keeps_what_it_logged(start, tmp_path):
    code = """
kill = Lambda(every=tk.At(steps=(23,)), on_step=lambda info: os.kill(os.getpid(), signal.SIGKILL))
made = trainer(LogMetrics(every=tk.Every(steps=5)), kill, logdir=sys.argv[1])
made.fit(endless, steps=100, eval_data=numbers(7), eval_every=tk.Every(steps=20))
"""
    process = start(code, tmp_path)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, stderr
    assert logged(tmp_path, "train/loss") == means(5, 10, 15, 20)
    assert logged(tmp_path, "eval/loss") == [(20, 7.0)]


SIGNALLED = """
def ready(info):
    if info.step == 20:
        print("ready", flush=True)
        while hang:
            pass

def say(what):
    return lambda *args: print(what, *(type(arg).__name__ for arg in args[1:]), flush=True)

callbacks = [LogMetrics(every=tk.Every(steps=5)), Lambda(on_step=ready)]
callbacks += [Lambda(on_exception=say("told"), close=say("closed"))]
callbacks += [Lambda(on_fit_end=say("ended"), close=say("closed"))]
made = trainer(*callbacks, logdir=sys.argv[1])
before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_fit_after_the_running_step(start, tmp_path, name):
    code = """
hang = False
result = made.fit(endless, steps=10**9, eval_data=numbers(7))
assert before == [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
print(result.stopped_by, result.step == int(result.state.step) == int(made.state.step), flush=True)
# The state is whole and the folder free.
print(made.fit(endless, steps=3).stopped_by, flush=True)
"""
    process = start(SIGNALLED + code, tmp_path)
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    process.send_signal(getattr(signal, name))
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    lines = stdout.splitlines()
    assert lines[:4] == ["ended", "closed", "closed", f"{name} True"]
    assert lines[-1] == "None"
    assert logged(tmp_path, "train/loss")[:4] == means(5, 10, 15, 20)
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert not any("eval/loss" in row.get("scalars", {}) for row in rows)


def test_a_second_ctrl_c_is_raised_at_once(start, tmp_path):
    code = """
hang = True
try:
    made.fit(endless, steps=10**9)
except KeyboardInterrupt:
    tk.writers.open_writer(sys.argv[1]).close()
    print("raised", flush=True)
"""
    process = start(SIGNALLED + code, tmp_path)
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert stdout.splitlines() == ["told KeyboardInterrupt", "closed", "closed", "raised"]
    assert logged(tmp_path, "train/loss")[:3] == means(5, 10, 15)


def test_a_fit_ended_by_an_exception_has_its_logs(tmp_path):
    def fail(info):
        raise ValueError("enough")

    made = trainer(
        LogMetrics(every=tk.Every(steps=5)), Lambda(every=tk.At(steps=(23,)), on_step=fail), logdir=tmp_path
    )
    with pytest.raises(ValueError, match="enough"):
        made.fit(numbers(*range(1, 31)), epochs=1)
    assert logged(tmp_path, "train/loss") == made.history["train/loss"] == means(5, 10, 15, 20)
    # The second fit adds its own, and repeats none.
    made.fit(numbers(*range(1, 31)), steps=1)
    assert logged(tmp_path, "train/loss")[:4] == means(5, 10, 15, 20)


class Broken(NullWriter):
    """Raises at its second write."""

    writes = 0

    def write_scalars(self, step, scalars):
        self.writes += 1
        if self.writes > 1:
            raise OSError("disk full")


def test_a_writer_that_raises_is_left_out_with_one_warning(tmp_path):
    broken = Broken()
    made = trainer(LogMetrics(every=tk.Every(steps=5)), logdir=tmp_path, writers=[broken])
    with pytest.warns(
        UserWarning, match=r"Broken\.write_scalars failed with OSError: disk full.*others go on"
    ) as found:
        result = made.fit(numbers(*range(1, 21)), epochs=1)
    assert len(found) == 1
    assert (result.step, broken.writes) == (20, 2)
    assert logged(tmp_path, "train/loss") == result.history["train/loss"] == means(5, 10, 15, 20)


def test_a_writer_that_raises_where_warnings_are_errors_leaves_nothing_open(tmp_path):
    class Unflushed(NullWriter):
        def flush(self):
            raise OSError("disk full")

    made = trainer(logdir=tmp_path, writers=[Unflushed()])
    with pytest.raises(UserWarning, match=r"Unflushed\.flush failed"):
        made.fit(numbers(1), epochs=1)
    assert logged(tmp_path, "train/loss") == [(1, 1.0)]
    # Its folder is free again.
    trainer(logdir=tmp_path, overwrite=True).fit(numbers(1), epochs=1)
