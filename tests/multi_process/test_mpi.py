"""The example under a real Open MPI: told to save it does, told to end it ends with 75, and it goes on from there."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.runs import scalars_of, steps_in

ROOT = pathlib.Path(__file__).parents[2]
EPOCHS, STEPS = 150, 150 * 22
# Seconds for two processes to start, compile and train on a busy machine.
PATIENCE = 240

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not there"),
]


def start(folder):
    """Starts the example with two processes on this machine; its output goes to a file."""
    command = ["mpirun", "--oversubscribe", *([] if os.geteuid() else ["--allow-run-as-root"]), "-n", "2"]
    command += [sys.executable, "examples/multihost/train.py", "--resume", "--epochs", str(EPOCHS)]
    command += ["--logdir", str(folder / "run")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (folder / "output").open("a") as out:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT)


def until(happened, process, folder):
    end = time.monotonic() + PATIENCE
    while not happened():
        ended = process.poll() is not None or time.monotonic() > end
        assert not ended, (folder / "output").read_text()
        time.sleep(0.1)


def children(process):
    """Returns the numbers of the processes that `mpirun` started on this machine."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    return [int(number) for number in listed.stdout.split()]


def test_it_saves_when_told_and_goes_on_where_it_was_ended(tmp_path):
    log, checkpoints = tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "checkpoints"
    process = start(tmp_path)
    try:
        until(lambda: log.exists() and log.read_text().count("\n") > 3, process, tmp_path)
        process.send_signal(signal.SIGUSR1)  # which mpirun passes on to all
        until(lambda: checkpoints.exists() and steps_in(checkpoints), process, tmp_path)
        assert steps_in(checkpoints)[-1] < STEPS
        os.kill(children(process)[-1], signal.SIGTERM)
        assert process.wait(timeout=PATIENCE) == os.EX_TEMPFAIL
        process = start(tmp_path)
        assert process.wait(timeout=PATIENCE) == 0
    finally:
        process.terminate()  # it ends its own
        process.wait()
    output = (tmp_path / "output").read_text()
    print(output)
    for index in range(2):
        assert f"process {index} of 2: SIGTERM at step " in output
        assert f"process {index} of 2: step {STEPS}, test loss " in output
    whole = {(step, f"eval/{name}") for step in range(22, STEPS + 1, 22) for name in ("loss", "accuracy")}
    whole |= {(step, name) for step in range(50, STEPS + 1, 50) for name in ("train/loss", "train/accuracy")}
    for written in scalars_of(tmp_path / "run"):  # no step twice
        assert {key for key in written if key[1] != "epoch"} == whole
