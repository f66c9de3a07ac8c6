"""A disk that is full, or a file that may not grow, during a save: what is whole stays, and it is said which."""

import shutil
import subprocess
import sys

import pytest

from tests.faults.kill import ROOT

# A callback whose memory does not fit at the third save: as text, or as an array.
HEAVY = """
import os, pathlib, resource, sys
import jax
import numpy as np
import pytest
import trainkit as tk
from tests.faults.small import check_whole, fit, make, steps

class Heavy(tk.callbacks.Callback):
    def __init__(self, kind, bytes):
        self._kind, self._bytes, self._saves = kind, bytes, 0

    def state_dict(self):
        self._saves += 1
        size = self._bytes if self._saves == 3 else 1
        noise = np.random.default_rng(0).integers(0, 256, size, np.uint8)
        return {"noise": noise.tolist() if self._kind == "text" else jax.numpy.asarray(noise)}

def full(logdir, kind, bytes):
    closed = []
    made = make(logdir, Heavy(kind, bytes), tk.callbacks.Lambda(close=lambda: closed.append(True)))
    with pytest.raises(
        OSError, match="the checkpoint of step 6 could not be saved.*newest complete one is of step 4"
    ) as caught:
        fit(made)
    assert closed == [True]
    assert steps(logdir) == [2, 4]
    print(caught.value)

def go_on(logdir):
    begun = []
    told = tk.callbacks.Lambda(on_fit_start=lambda info: begun.append(info.step))
    result = fit(make(logdir, Heavy("text", 1), told))
    assert begun == [4]
    check_whole(logdir, result)
    print("whole")

logdir = pathlib.Path(sys.argv[1])
"""

LIMITED = """
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
for kind in ("text", "array"):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    full(logdir / kind, kind, 200_000)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    go_on(logdir / kind)
"""

FULL = """
for kind in ("text", "array"):
    full(logdir / kind, kind, 3_000_000)
    go_on(logdir / kind)
"""


def run(code, *before, logdir):
    command = [*before, sys.executable, "-c", HEAVY + code, str(logdir)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1::2] == ["whole", "whole"]
    return done


def test_a_file_that_may_not_grow(tmp_path):
    run(LIMITED, logdir=tmp_path)


def test_a_disk_that_fills_up(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=1m tmpfs {disk}"
    # In a mount namespace of its own: it goes with the process.
    alone = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    run(FULL, *alone, logdir=disk)
