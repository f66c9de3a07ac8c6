"""A disk that is full, or a file that may not grow, during a save: what is whole stays, and it is said which."""

import contextlib
import pathlib
import resource
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.faults.kill import ROOT
from tests.faults.small import Raises, check_whole, fit, make, steps
from tests.helpers.processes import on_a_disk
from trainkit.callbacks import Callback, Lambda

LIMIT = 1_000_000


class Heavy(Callback):
    """Remembers more at the third save than there is room for, as text or as an array."""

    def __init__(self, kind, size=3 * LIMIT):
        self._kind, self._size, self._saves = kind, size, 0

    def state_dict(self):
        self._saves += 1
        size = self._size if self._saves == 3 else 1
        if self._kind == "text":
            return {"noise": "x" * size}
        return {"noise": jax.numpy.asarray(np.random.default_rng(0).integers(0, 256, size, np.uint8))}


def fail_to_save(logdir, kind):
    """Fails unless a fit whose third save has no room says so, and leaves the two before it."""
    closed = []
    made = make(logdir, Heavy(kind), Lambda(close=lambda: closed.append(True)))
    told = "the checkpoint of step 6 could not be saved.*newest complete one is of step 4"
    with pytest.raises(OSError, match=told):
        fit(made)
    assert closed == [True]
    assert steps(logdir) == [2, 4]


def go_on(logdir):
    """Fails unless a run with room goes on from there, and ends as if nothing had been."""
    begun = []
    result = fit(make(logdir, Heavy("text", 1), Lambda(on_fit_start=lambda info: begun.append(info.step))))
    assert begun == [4]
    check_whole(logdir, result)


@contextlib.contextmanager
def limited():
    """Lets no file grow beyond the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", ["text", "array"])
def test_a_file_that_may_not_grow(tmp_path, kind):
    with limited():
        fail_to_save(tmp_path, kind)
    go_on(tmp_path)


def test_a_disk_that_fills_up(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = [*on_a_disk(disk, f"size={LIMIT}"), sys.executable, "-m", "tests.faults.test_disk", disk]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def resume_on_a_full_disk(disk):
    """Fails unless a resume that can't take back log lines names the file, changes nothing, and works later."""
    logdir = disk / "full"
    with pytest.raises(RuntimeError, match="broken in on_step"):
        fit(make(logdir, Raises("on_step", 9)))
    with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    before = {path: path.read_bytes() for path in logdir.rglob("*") if path.is_file()}
    with pytest.raises(OSError, match=r"No space left on device: .*(metrics\.jsonl|tfevents)"):
        fit(make(logdir))
    after = {path: path.read_bytes() for path in logdir.rglob("*") if path.is_file()}
    lock = logdir / ".trainkit.lock"  # says who has the folder, where there is room to
    assert before | {lock: b""} == after | {lock: b""}
    (disk / "filler").unlink()
    check_whole(logdir, fit(make(logdir)))


if __name__ == "__main__":
    resume_on_a_full_disk(pathlib.Path(sys.argv[1]))
    for kind in ("text", "array"):
        fail_to_save(pathlib.Path(sys.argv[1]) / kind, kind)
        # The disk is as small as it was: what the failed save left there is no more in the way.
        go_on(pathlib.Path(sys.argv[1]) / kind)
