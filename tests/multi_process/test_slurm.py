"""The batch file of the example under a real SLURM: told that its time is up, it saves, queues again and finishes."""

import os
import pathlib
import sys
import tempfile
import time

import pytest

import trainkit as tk
from tests.helpers.runs import scalars_of, steps_in
from tests.multi_process.slurm import Slurm, cluster, missing

ROOT = pathlib.Path(__file__).parents[2]
EPOCHS, STEPS = 200, 200 * 22
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
# Seconds for a job to start, compile and train on a busy machine.
PATIENCE = 240

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=f"a SLURM cluster wants {', '.join(missing())}"),
]


@pytest.fixture(scope="module")
def slurm():
    """A cluster of this machine, in a folder of its own: a socket's path is 107 characters long at most."""
    with (
        tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder,
        cluster(pathlib.Path(folder)) as running,
    ):
        path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), running.env["PATH"]])
        running.env |= {"PATH": path, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        yield running


class Job:
    """The example as a job of two tasks on one node.

    Attributes:
        number: of SLURM.
        logdir: of the run.
    """

    def __init__(self, slurm: Slurm, folder: pathlib.Path) -> None:
        (folder / "examples").symlink_to(ROOT / "examples")
        self.slurm = slurm
        # What the file says of nodes and devices is that of another cluster, and one hour is as long as none.
        options = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=60"]
        script = ["examples/multihost/slurm.sbatch", "--epochs", str(EPOCHS)]
        self._output = folder / "output"
        self.number = slurm.ask(
            "sbatch", "--parsable", f"--chdir={folder}", f"--output={self._output}", *options, *script
        )
        self.logdir = folder / "runs" / "multihost" / self.number

    @property
    def output(self) -> str:
        return self._output.read_text() if self._output.exists() else ""

    def until(self, happened, what):
        """Waits for something while the job runs."""
        end = time.monotonic() + PATIENCE
        while not happened():
            state = self.slurm.job(self.number)["JobState"]
            ended = state in ENDED or time.monotonic() > end
            assert not ended, (what, state, self.output, self.slurm.logs())
            time.sleep(0.1)

    def until_it_trains(self):
        log = self.logdir / "metrics.jsonl"
        self.until(lambda: log.exists() and log.read_text().count("\n") > 3, "it trains")

    def signal(self, name):
        self.slurm.ask("scancel", f"--signal={name}", self.number)


def test_told_that_its_time_is_up_it_goes_back_into_the_queue_and_finishes(slurm, tmp_path):
    job = Job(slurm, tmp_path)
    job.until_it_trains()
    checkpoints = job.logdir / "checkpoints"
    job.signal("USR1")
    job.until(lambda: checkpoints.exists() and steps_in(checkpoints), "SIGUSR1 saves")
    assert steps_in(checkpoints)[-1] < STEPS
    job.signal("TERM")  # as SLURM itself does, at the time that --signal names
    ended = slurm.wait(job.number, ENDED, PATIENCE, restarts=1)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), job.output
    output = job.output
    print(output)
    for index in range(2):
        assert f"process {index} of 2: SIGTERM at step " in output
        assert f"process {index} of 2: step {STEPS}, test loss " in output
    assert output.count(f"job {job.number} goes back into the queue") == 1
    whole = {(step, f"eval/{name}") for step in range(22, STEPS + 1, 22) for name in ("loss", "accuracy")}
    whole |= {(step, name) for step in range(50, STEPS + 1, 50) for name in ("train/loss", "train/accuracy")}
    for log in scalars_of(job.logdir):  # no step twice
        assert {key for key in log if key[1] != "epoch"} == whole
    last = tk.checkpoint.verify(job.logdir)[-1]
    assert (last.step, last.problems) == (STEPS, ())


def test_a_job_that_is_cancelled_saves_and_stays_away(slurm, tmp_path):
    job = Job(slurm, tmp_path)
    job.until_it_trains()
    slurm.ask("scancel", job.number)
    ended = slurm.wait(job.number, ENDED, PATIENCE)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), job.output
    print(job.output)
    assert "SIGTERM at step" in job.output
    assert "goes back into the queue" not in job.output
    assert all(info.problems == () for info in tk.checkpoint.verify(job.logdir))
