"""`Progress`: plain lines off a terminal and a bar on one, with the time in the tests' hands."""

import contextlib
import io
import os
import pty
import re
import sys

import numpy as np
import pytest

from tests.helpers.infos import PLAN, Lazy, make_info
from trainkit._core.cadence import Every
from trainkit.callbacks import Plan, Progress


class Clock:
    seconds = 100.0

    def __call__(self):
        return self.seconds


class Terminal(io.StringIO):
    def isatty(self):
        return True


def fit(stream, *, step_seconds=1.0, plan=PLAN, epochs=5, evaluate=True):
    """Five passes of 20 steps, `on_step` at every fifth."""
    clock = Clock()
    progress = Progress(stream=stream, clock=clock)
    progress.on_fit_start(make_info(0, epoch=0, plan=plan))
    step = 0
    for epoch in range(1, epochs + 1):
        progress.on_epoch_start(make_info(step, epoch=epoch, plan=plan))
        for _ in range(4):
            step += 5
            clock.seconds += 5 * step_seconds
            progress.on_step(make_info(step, {"train/loss": 1 / step}, epoch=epoch, plan=plan))
        if evaluate:
            progress.on_eval_start(make_info(step, epoch=epoch, plan=plan))
            clock.seconds += 3 * step_seconds
            progress.on_eval_end(make_info(step, {"eval/loss": 2 / step}, epoch=epoch, plan=plan))
        progress.on_epoch_end(make_info(step, {"train/loss": 0.5 / step}, epoch=epoch, plan=plan))
    progress.on_fit_end(make_info(step, epoch=epochs, plan=plan))
    progress.close()


def test_lines_are_plain():
    stream = io.StringIO()
    fit(stream)
    text = stream.getvalue()
    assert re.search(r"[^\n -~]", text) is None
    assert text.endswith("\n")


def test_lines_say_everything():
    stream = io.StringIO()
    fit(stream)
    lines = stream.getvalue().splitlines()
    # Metrics are those of one interval before.
    assert lines[0] == "epoch 1/5  step 10/100  1.0 steps/s  0:00:10  eta 0:01:30  train loss 0.2"
    # Beside those of an evaluation stand those of the epoch it ends.
    assert lines[-1] == "epoch 5/5  step 100/100  1.0 steps/s  0:01:55  train loss 0.005  eval loss 0.02"


def test_without_an_evaluation_nothing_is_waited_for():
    stream = io.StringIO()
    fit(stream, evaluate=False)
    assert stream.getvalue().splitlines()[-1].endswith("train loss 0.01")


def test_evaluation_does_not_count_as_training_time():
    stream = io.StringIO()
    fit(stream)
    assert {
        re.search(r"[\d.]+ (?:steps/s|s/step)", line)[0]
        for line in stream.getvalue().splitlines()
        if "evaluating" not in line
    } == {"1.0 steps/s"}


@pytest.mark.parametrize(
    ("step_seconds", "lines"),
    [
        pytest.param(0.0001, 1, id="a fit of a moment has its last line"),
        pytest.param(0.01, 1, id="passes of a quarter of a second"),
        pytest.param(0.1, 5, id="a line for each pass of two seconds, and the last"),
        # After 10 s of silence: at steps 10 and 20 and so on; at the end of each pass; and the last.
        pytest.param(1.0, 15, id="passes of 23 seconds"),
    ],
)
def test_lines_come_at_a_sane_cadence(step_seconds, lines):
    stream = io.StringIO()
    fit(stream, step_seconds=step_seconds)
    assert len(stream.getvalue().splitlines()) == lines


def test_unknown_length():
    stream = io.StringIO()
    fit(stream, plan=Plan(), evaluate=False)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "epoch 1  step 10  1.0 steps/s  0:00:10  train loss 0.2"


def test_slow_and_fast_steps():
    slow, fast = io.StringIO(), io.StringIO()
    fit(slow, step_seconds=4.0, evaluate=False)
    fit(fast, step_seconds=0.002, evaluate=False)
    assert "4.0 s/step" in slow.getvalue()
    assert "500 steps/s" in fast.getvalue()


def test_looks_at_no_metric_before_the_next_interval():
    progress = Progress(stream=io.StringIO(), clock=Clock())
    progress.on_fit_start(make_info())
    first, second = Lazy({"train/loss": 1.0}), Lazy({"train/loss": 2.0})
    progress.on_step(make_info(1, first))
    assert first.looks == 0
    progress.on_step(make_info(2, second))
    assert first.looks > 0
    assert second.looks == 0
    progress.on_exception(make_info(2), KeyboardInterrupt())
    progress.close()
    assert second.looks == 0


def test_arrays_are_not_shown():
    stream = io.StringIO()
    progress = Progress(stream=stream, clock=Clock())
    progress.on_fit_start(make_info())
    progress.on_eval_end(make_info(1, {"eval/confusion": np.eye(2), "eval/loss": np.float32(0.5)}))
    progress.on_fit_end(make_info(1))
    assert stream.getvalue().endswith("eval loss 0.5\n")


def test_training_metrics_come_first():
    stream = io.StringIO()
    progress = Progress(stream=stream, clock=Clock())
    progress.on_fit_start(make_info())
    progress.on_eval_end(make_info(1, {"test/loss": 3.0, "eval/loss": 2.0}))
    progress.on_fit_end(make_info(1, {"train/loss": 1.0}))
    assert stream.getvalue().endswith("train loss 1  test loss 3  eval loss 2\n")


def test_a_second_fit_begins_from_its_own_step():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream=stream, clock=clock)
    for first in (0, 100):
        progress.on_fit_start(make_info(first, plan=Plan(first_step=first, steps=first + 100)))
        clock.seconds += 50
        progress.on_fit_end(make_info(first + 100, epoch=1, plan=Plan(first_step=first, steps=first + 100)))
        progress.close()
    assert stream.getvalue().splitlines() == [
        "epoch 1  step 100/100  2.0 steps/s  0:00:50",
        "epoch 1  step 200/200  2.0 steps/s  0:00:50",
    ]


def test_a_stream_that_was_closed_does_not_end_the_fit(caplog):
    stream = io.StringIO()
    progress = Progress(stream=stream, clock=Clock())
    progress.on_fit_start(make_info())
    stream.close()
    progress.on_fit_end(make_info(1))
    progress.close()
    assert "Progress can't write any more" in caplog.text


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


def without_colours(text):
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def test_the_bar_fits_into_80_columns_and_does_not_scroll(terminal):
    fit(terminal)
    text = without_colours(terminal.getvalue())
    pieces = re.split(r"\r|\n|\x1b\[\d*[A-K]|\x1b\[\?25[lh]", text)
    assert max(map(len, pieces)) == 80
    # Before the last picture, each new line was gone back over: as many up as down, but for those that stay.
    assert text.count("\n") - text.count("\x1b[1A") == 3


def test_the_bar_says_everything(terminal):
    fit(terminal)
    pictures = without_colours(terminal.getvalue())
    assert "starting" in pictures
    assert "evaluating" in pictures
    assert re.search(r"epoch 2/5 ━+╸?━* +30/100 +1\.0 steps/s 0:00:33 eta 0:01:10", pictures)
    last = pictures[pictures.rindex("epoch") :]
    assert re.match(r"epoch 5/5 ━+ 100/100 +1\.0 steps/s 0:01:55", last)
    assert "train  loss 0.005" in last
    assert "eval   loss 0.02" in last


@pytest.mark.parametrize("end", ["on_fit_end", "on_exception", None])
def test_the_cursor_comes_back(terminal, end):
    out, err = sys.stdout, sys.stderr
    progress = Progress(stream=terminal, clock=Clock())
    progress.on_fit_start(make_info())
    assert "\x1b[?25l" in terminal.getvalue()
    if end is not None:
        getattr(progress, end)(*(make_info(1), KeyError())[: 2 if end == "on_exception" else 1])
    progress.close()
    progress.close()
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("\x1b[?25l")
    assert (sys.stdout, sys.stderr) == (out, err)


def test_prints_stay_in_a_stream_that_is_no_terminal(terminal, monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    progress = Progress(stream=terminal, clock=Clock())
    progress.on_fit_start(make_info())
    print("for the file")
    progress.close()
    assert file.getvalue() == "for the file\n"
    assert "for the file" not in terminal.getvalue()


def test_prints_to_the_terminal_go_above_the_bar(terminal, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal)
    clock = Clock()
    progress = Progress(clock=clock)
    progress.on_fit_start(make_info())
    print("a warning", file=sys.stderr)
    progress.close()
    assert re.search(r"a warning\n.*epoch", without_colours(terminal.getvalue()), re.DOTALL)


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_terminal_without_control_sequences_gets_lines(terminal, monkeypatch, term):
    monkeypatch.setenv("TERM", term)
    fit(terminal)
    assert "\x1b" not in terminal.getvalue()


def test_a_real_terminal_that_goes_away_does_not_end_the_fit(terminal, monkeypatch):
    master, slave = pty.openpty()
    monkeypatch.setattr(sys, "stdout", terminal)
    stream = os.fdopen(slave, "w", encoding="utf-8")
    progress = Progress(stream=stream, clock=Clock())
    progress.on_fit_start(make_info())
    assert b"\x1b[?25l" in os.read(master, 65536)
    assert sys.stdout is not terminal
    os.close(master)
    progress.on_fit_end(make_info(1))
    progress.close()
    assert sys.stdout is terminal
    # The stream's own close finds the terminal gone.
    with contextlib.suppress(OSError):
        stream.close()


def test_a_terminal_that_can_not_be_written_to_gives_the_prints_back(terminal, monkeypatch, caplog):
    monkeypatch.setattr(sys, "stdout", terminal)
    stream = Terminal()
    progress = Progress(stream=stream, clock=Clock())
    progress.on_fit_start(make_info())

    def fail(text):
        raise OSError("Input/output error")

    monkeypatch.setattr(stream, "write", fail)
    progress.on_fit_end(make_info(1))
    assert sys.stdout is terminal
    assert "shows nothing from here on: Input/output error" in caplog.text
    progress.close()


def test_draws_at_most_ten_times_a_second(terminal):
    fit(terminal, step_seconds=0.0001)
    assert without_colours(terminal.getvalue()).count("epoch") <= 6


def test_cadence():
    assert Progress().every == Every(seconds=0.5)
    with pytest.raises(TypeError, match=r"every=50.*tk\.Every"):
        Progress(50)
