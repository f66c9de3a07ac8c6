"""A callback or a writer that raises, in each of its methods: nothing saved is lost, and everything is closed."""

import subprocess
import sys

import pytest

from tests.faults.kill import ROOT
from tests.faults.small import Raises, check_whole, fit, make, steps
from trainkit.callbacks import Callback, Lambda
from trainkit.writers import NullWriter

# Hook, which call of it raises, and the checkpoints there are then.
HOOKS = [
    ("on_fit_start", 1, []),
    ("on_epoch_start", 1, []),
    ("on_step", 9, [4, 6, 8]),
    ("on_eval_start", 2, [4, 6, 8]),
    ("on_eval_end", 2, [4, 6, 8]),
    ("on_epoch_end", 1, [6, 8, 10]),
    ("on_fit_end", 1, [8, 10, 12]),
    ("state_dict", 4, [2, 4]),  # the first call is before the fit, for what the callback is to go back to
    ("close", 1, [8, 10, 12]),
]


def counting(closed, name):
    return Lambda(close=lambda: closed.append(name))


@pytest.mark.parametrize(
    ("hook", "call", "saved", "error"),
    [*((*case, RuntimeError) for case in HOOKS), (*HOOKS[2], SystemExit), (*HOOKS[-1], SystemExit)],
)
def test_a_callback_that_raises(tmp_path, hook, call, saved, error):
    closed = []
    # Checkpoints are begun last, so what raises in on_fit_start comes before; all that was begun is closed.
    made = make(tmp_path, counting(closed, "before"), Raises(hook, call, error), counting(closed, "after"))
    with pytest.raises(error, match=f"broken in {hook}"):
        fit(made)
    assert closed == (["before"] if hook == "on_fit_start" else ["before", "after"])
    assert (steps(tmp_path) if saved else []) == saved
    # The lock and the writers are free, and the next run does the rest.
    check_whole(tmp_path, fit(make(tmp_path, Raises("none"))))


def test_a_callback_that_raises_when_it_is_told_what_it_remembered(tmp_path):
    with pytest.raises(RuntimeError, match="broken in on_step"):
        fit(make(tmp_path, Raises("on_step", 9)))
    with pytest.raises(RuntimeError, match="broken in load_state_dict"):
        fit(make(tmp_path, Raises("load_state_dict")))
    assert steps(tmp_path) == [4, 6, 8]
    check_whole(tmp_path, fit(make(tmp_path, Raises("none"))))


@pytest.mark.parametrize("hook", ["on_exception", "close"])
def test_the_first_exception_is_raised_and_the_second_a_note_on_it(tmp_path, hook):
    closed = []
    made = make(tmp_path, Raises("on_step", 9), Raises(hook), counting(closed, "after"))
    with pytest.raises(RuntimeError, match="broken in on_step") as caught:
        fit(made)
    assert any(f"broken in {hook}" in note for note in caught.value.__notes__)
    assert closed == ["after"]
    assert steps(tmp_path) == [4, 6, 8]
    check_whole(tmp_path, fit(make(tmp_path, Raises("none"), Raises("none"))))


def test_what_a_checkpoint_cannot_hold_is_named_and_those_before_are_whole(tmp_path):
    class Odd(Callback):
        saves = 0

        def state_dict(self):
            self.saves += 1
            return {"odd": {1, 2} if self.saves == 3 else 1}

    with pytest.raises(TypeError, match=r"callbacks/Odd/odd is of type set"):
        fit(make(tmp_path, Odd()))
    assert steps(tmp_path) == [2, 4]
    check_whole(tmp_path, fit(make(tmp_path)))


class BrokenWriter(NullWriter):
    """Raises in one of its methods."""

    def __init__(self, method, error):
        self._method, self._error = method, error

    def _called(self, method):
        if method == self._method:
            raise self._error(f"broken in {method}")

    def write_scalars(self, step, scalars):
        self._called("write_scalars")

    def rewind(self, step, names):
        self._called("rewind")

    def flush(self):
        self._called("flush")


@pytest.mark.parametrize("method", ["write_scalars", "flush"])
def test_a_writer_that_raises_is_left_out_and_the_run_is_whole(tmp_path, method):
    with pytest.raises(RuntimeError, match="broken in on_step"):
        fit(make(tmp_path, Raises("on_step", 9)))
    broken = make(tmp_path, Raises("none"), writers=[BrokenWriter(method, OSError)])
    with pytest.warns(UserWarning, match=rf"BrokenWriter\.{method} failed with OSError: broken"):
        result = fit(broken)
    check_whole(tmp_path, result)


def test_a_log_that_cannot_be_set_back_ends_the_resume_before_anything_is_lost(tmp_path):
    with pytest.raises(RuntimeError, match="broken in on_step"):
        fit(make(tmp_path, Raises("on_step", 9)))
    broken = make(tmp_path, writers=[BrokenWriter("rewind", OSError)])
    with pytest.raises(OSError, match="broken in rewind"):
        fit(broken)
    check_whole(tmp_path, fit(make(tmp_path)))


@pytest.mark.parametrize("method", ["write_scalars", "flush"])
def test_a_writer_that_ends_the_process_ends_the_fit_with_everything_closed(tmp_path, method):
    broken = make(tmp_path, writers=[BrokenWriter(method, SystemExit)])
    with pytest.raises(SystemExit, match=f"broken in {method}"):
        fit(broken)
    check_whole(tmp_path, fit(make(tmp_path)))


EXIT = """
import sys
from tests.faults.small import Raises, fit, make
fit(make(sys.argv[1], Raises("on_step", 9)))
"""


def test_the_process_of_a_fit_that_raised_ends_with_a_status_and_the_reason(tmp_path):
    done = subprocess.run([sys.executable, "-c", EXIT, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("RuntimeError: broken in on_step\n")
    assert steps(tmp_path) == [4, 6, 8]
    check_whole(tmp_path, fit(make(tmp_path, Raises("none"))))
