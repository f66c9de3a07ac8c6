"""A SLURM cluster of this machine alone, for tests: munged, slurmctld and slurmd, with everything in one folder.

Owns the daemons and what asks them; the tests say what runs there. It wants root, and Debian's packages `slurm-wlm`
and `munge`; no accounting, no cgroups, nothing of the system's own configuration.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
_CPUS = 4

_CONFIGURATION = """\
ClusterName=trainkit
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={controller}
SlurmdPort={daemon}
AuthType=auth/munge
CredType=cred/munge
# A job put back into the queue begins when its old credentials have expired, which is two minutes by default.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/completed.log
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """Returns what has to be there for a cluster and is not."""
    found = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    return found if os.geteuid() == 0 else ["root", *found]


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


class Slurm:
    """A cluster that runs.

    Attributes:
        env: with which its clients are called.

    Args:
        folder: of its files.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}

    def ask(self, *command: str | os.PathLike[str]) -> str:
        """Returns what a client of the cluster prints.

        Raises:
            AssertionError: it failed.
        """
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """Returns what the controller knows of a job, by SLURM's own names such as `JobState` and `Restarts`."""
        words = self.ask("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(
        self, number: str, states: tuple[str, ...], seconds: float, *, restarts: int = 0
    ) -> dict[str, str]:
        """Returns what is known of a job when it is in one of `states`, started again at least `restarts` times.

        Raises:
            AssertionError: that took longer than `seconds`.
        """
        end = time.monotonic() + seconds
        while True:
            job = self.job(number)
            if job["JobState"] in states and int(job["Restarts"]) >= restarts:
                return job
            assert time.monotonic() < end, (job, self.logs())
            time.sleep(0.2)

    def logs(self) -> str:
        """Returns the last lines of the daemons' logs."""
        logs = [self.folder / f"{name}.log" for name in ("slurmctld", "slurmd")]
        return "\n".join(log.read_text()[-3000:] for log in logs if log.exists())


@contextlib.contextmanager
def cluster(folder: pathlib.Path) -> Iterator[Slurm]:
    """Starts a cluster in `folder` and stops it afterwards, whatever still runs there."""
    slurm, host = Slurm(folder), socket.gethostname().split(".")[0]
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir(mode=0o755)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    controller, daemon = _free_ports(2)
    names = {"host": host, "folder": folder, "controller": controller, "daemon": daemon, "cpus": _CPUS}
    (folder / "slurm.conf").write_text(_CONFIGURATION.format(**names))
    munge = {"key-file": key, "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    with contextlib.ExitStack() as stack:
        options = [f"--{name}={folder / 'munge' / str(value)}" for name, value in munge.items()]
        stack.enter_context(_running(slurm, "munged", "--foreground", "--force", *options))
        _until(lambda: (folder / "munge" / "socket").exists(), "munged", folder)
        stack.enter_context(_running(slurm, "slurmctld", "-D"))
        stack.enter_context(_running(slurm, "slurmd", "-D", "-N", host))
        _until(lambda: _answers(slurm), "slurmctld and slurmd", folder)
        try:
            yield slurm
        finally:
            # Tasks are children of daemons of their own, which outlive slurmd.
            subprocess.run(["scancel", "--user=root", "--signal=KILL", "--full"], env=slurm.env, timeout=60)
            subprocess.run(["scancel", "--user=root"], env=slurm.env, timeout=60)
            _until(
                lambda: not slurm.ask("squeue", "--noheader", "--states=all", "--states=R,CG"), "jobs", folder
            )


def _answers(slurm: Slurm) -> bool:
    asked = subprocess.run(
        ["sinfo", "--noheader", "--format=%t"], env=slurm.env, capture_output=True, text=True, timeout=60
    )
    return asked.stdout.strip() == "idle"


@contextlib.contextmanager
def _running(slurm: Slurm, *command: str) -> Iterator[None]:
    with (slurm.folder / f"{command[0]}.out").open("w") as out:
        process = subprocess.Popen(command, env=slurm.env, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _until(done, what: str, folder: pathlib.Path, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not done():
        outs = "\n".join(f"{out.name}: {out.read_text()[-2000:]}" for out in folder.glob("*.out"))
        assert time.monotonic() < end, f"{what} did not come up within {seconds} s\n{outs}"
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("localhost", 0))
        return [one.getsockname()[1] for one in sockets]
