"""Ends runs again and again at chosen and random moments: `python -m tests.faults.kill --kills 100`.

Each life of a run is a process of its own, started with the same command and ended by a signal. When one comes
through, what it leaves is compared with what a run leaves that was never ended, bit for bit. Owns the moments,
the comparison and the table; not the run, which is `tests.faults.worker`.
"""

import argparse
import collections
import contextlib
import dataclasses
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

import trainkit as tk
from tests.helpers.runs import scalars_of

ROOT = pathlib.Path(__file__).parents[2]
# Seconds a life may take on a busy machine.
PATIENCE = 180
MOMENTS = (
    *("starting", "compiling", "training", "evaluating", "saving", "saved", "removing", "rewinding"),
    *("closing", "anywhere"),
)
_PARTS = {"saving": ".orbax-checkpoint-tmp", "removing": ".removed", "rewinding": ".rewrite-"}


@dataclasses.dataclass
class Life:
    """One process of a run, ended or come through.

    Attributes:
        lines: what it said.
        status: of its exit.
        hit: whether the signal found it alive, and was heard.
        errors: what it wrote to its standard error.
    """

    lines: list[str]
    status: int
    hit: bool
    errors: str

    def last(self, word):
        """Returns the number in the last line that begins with `word`, None where there is none."""
        found = [line.split()[1] for line in self.lines if line.startswith(f"{word} ")]
        return int(found[-1]) if found else None


def environment(cache):
    """Returns the environment of a worker: what is compiled is kept in the folder `cache`."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def start(logdir, cache, *options):
    """Starts a worker whose result will be beside `logdir`."""
    command = [sys.executable, "-m", "tests.faults.worker", str(logdir), f"{logdir}.npz", *options]
    # Unbuffered: a line read here takes nothing of the next from what `communicate` reads.
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(cache), stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )


def live(logdir, cache, moment=None, *, rng=None, number=signal.SIGKILL, seconds=3.0):
    """Runs a worker, and ends it at a moment.

    Args:
        logdir: of the run.
        cache: for compiled programs.
        moment: one of `MOMENTS`, None to let it come through.
        rng: for what is left to chance.
        number: the signal.
        seconds: what a whole life takes, about.
    """
    process, lines = start(logdir, cache), []
    try:
        if moment is not None:
            _reach(process, lines, logdir, moment, rng, seconds)
        hit = moment is not None and process.poll() is None
        if hit:
            process.send_signal(number)
        rest, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait()
    # JAX's callback of the garbage collector swallows a Ctrl-C that comes to it before a fit listens.
    errors = errors.decode()
    hit = hit and "Exception ignored in" not in errors
    return Life(lines + rest.decode().splitlines(), process.returncode, hit, errors)


def _reach(process, lines, logdir, moment, rng, seconds):
    """Returns when `moment` has come, or the process has ended."""
    if moment in ("starting", "anywhere"):
        _pass(process, rng.uniform(0, seconds * (0.6 if moment == "starting" else 1.0)))
    elif moment in ("saving", "saved", "removing", "rewinding"):
        _read_until(process, lines, "compile", 1)
        # Logs are rewound once in a life; saves and removals come again.
        _watch(process, logdir, moment, skip=0 if moment == "rewinding" else rng.randrange(3))
        if moment == "saving":
            _pass(process, rng.uniform(0, 0.06))
    else:
        word = {"compiling": "compile", "training": "train", "evaluating": "evaluate", "closing": "close"}[
            moment
        ]
        _read_until(process, lines, word, rng.randint(1, 6) if moment == "training" else 1)
        _pass(process, rng.uniform(0, {"compiling": 0.2 * seconds, "closing": 0.1}.get(moment, 0.02)))


def _pass(process, seconds):
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=seconds)


def _read_until(process, lines, word, count):
    while count and (line := process.stdout.readline()):
        lines.append(line.decode().rstrip("\n"))
        count -= lines[-1].startswith(f"{word} ")


def _watch(process, logdir, moment, skip):
    """Returns when something new of a kind is in the folder, after `skip` of them."""
    folder = logdir if moment == "rewinding" else logdir / "checkpoints"
    known = _seen(folder, moment)
    end = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < end:
        new = _seen(folder, moment) - known
        skip -= len(new)
        if skip < 0:
            return
        known |= new
        time.sleep(0.0005)


def _seen(folder, moment):
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return set()
    if moment == "saved":
        return {name for name in names if name.isdecimal()}
    return {name for name in names if _PARTS[moment] in name}


@dataclasses.dataclass
class Outcome:
    """What a run that came through left: the arrays of its result, and the scalars of both logs."""

    arrays: dict[str, np.ndarray]
    logs: tuple[dict, dict]

    @classmethod
    def of(cls, logdir):
        with np.load(f"{logdir}.npz") as found:
            return cls(dict(found), scalars_of(logdir))

    def differences(self, other):
        """Returns a line for everything that is not the same, bit for bit."""
        found = [f"{name} is in one only" for name in self.arrays.keys() ^ other.arrays.keys()]
        for name in self.arrays.keys() & other.arrays.keys():
            if self.arrays[name].tobytes() != other.arrays[name].tobytes():
                found.append(f"{name}: {self.arrays[name]} != {other.arrays[name]}")
        for log, mine, theirs in zip(("JSONL", "TensorBoard"), self.logs, other.logs, strict=True):
            if mine != theirs:
                keys = [key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)]
                found.append(f"{log}: {sorted(keys)}")
        return found


class Run:
    """One run over all of its lives: checks after each of them that nothing saved before was lost."""

    def __init__(self, logdir, cache, number=signal.SIGKILL, seconds=3.0):
        self.logdir, self._cache, self._number, self._seconds = logdir, cache, number, seconds
        self._newest, self._lives = None, []

    def live(self, moment=None, rng=None):
        """Lives once more; returns the life, and what was lost."""
        life = live(self.logdir, self._cache, moment, rng=rng, number=self._number, seconds=self._seconds)
        self._lives.append(life)
        return life, self._lost(life)

    def _lost(self, life):
        lost, begun = [], life.last("fit")
        if begun is not None and begun != (self._newest or 0):
            lost.append(f"went on from step {begun}, the newest checkpoint was of step {self._newest}")
        if not life.hit and life.status:
            lost.append(f"ended with status {life.status}: {life.errors[-2000:]}")
        if life.hit and not self._reported(life):
            lost.append(f"got {self._number.name}, ended with status {life.status} after {life.lines[-3:]}")
        folder = self.logdir / "checkpoints"
        found = tk.checkpoint.verify(self.logdir) if folder.is_dir() else []
        lost += [f"checkpoint {one.step}: {problem}" for one in found for problem in one.problems]
        newest = max((one.step for one in found), default=None)
        if (newest or 0) < (self._newest or 0):
            lost.append(f"the newest checkpoint was of step {self._newest}, and is now of step {newest}")
        if self._number != signal.SIGKILL and life.last("result") not in (None, newest):
            lost.append(f"ended at step {life.last('result')}, the newest checkpoint is of step {newest}")
        self._newest = newest
        return lost

    def _reported(self, life):
        """Says whether the exit was what the signal should have made of it."""
        if self._number == signal.SIGKILL:
            return life.status == -signal.SIGKILL
        if life.status == 0:
            return life.lines[-1] == f"done {self._number.name}"
        # Before a fit begins and after it ended, signals do what they do in any program.
        return life.last("fit") is None or life.last("result") is not None


def reference(folder, cache):
    """Runs without a fault; returns what it left, and the seconds a life takes once all is compiled."""
    began = time.monotonic()
    life = live(folder / "whole", cache)
    assert life.status == 0, life.errors
    return Outcome.of(folder / "whole"), (time.monotonic() - began) / 2


@dataclasses.dataclass
class Table:
    """What came of the faults, by moment."""

    injected: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    recovered: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    lost: list[str] = dataclasses.field(default_factory=list)

    def __str__(self):
        rows = [f"{'moment':12} injected recovered"]
        rows += [f"{m:12} {self.injected[m]:8} {self.recovered[m]:9}" for m in MOMENTS if self.injected[m]]
        rows.append(f"{'all':12} {self.injected.total():8} {self.recovered.total():9}")
        return "\n".join([*rows, *(self.lost or ["nothing lost"])])


def campaign(kills, moments, folder, *, number=signal.SIGKILL, seed=0):
    """Ends runs `kills` times, letting each come through in the end; returns the table.

    Args:
        kills: how often.
        moments: in turn, over and over.
        folder: empty, for everything.
        number: the signal.
        seed: of what is left to chance.
    """
    rng, cache, table = random.Random(seed), folder / "cache", Table()
    expected, seconds = reference(folder, cache)
    runs = 0
    while table.injected.total() < kills:
        run, hits, lost = Run(folder / f"run-{runs}", cache, number, seconds), [], []
        # A few lives only, so that many runs come through and are compared.
        for _ in range(min(10, kills - table.injected.total())):
            moment = moments[table.injected.total() % len(moments)]
            life, found = run.live(moment, rng)
            lost += [f"run {runs}, {moment}: {line}" for line in found]
            if life.hit:
                hits.append(moment)
                table.injected[moment] += 1
            elif life.status == 0:
                moments = (*moments[1:], moments[0])  # too late for this one: another now
                break
        life, found = run.live()
        lost += [f"run {runs}, at the end: {line}" for line in found]
        if life.status == 0:
            lost += [f"run {runs}: {line}" for line in Outcome.of(run.logdir).differences(expected)]
        if not lost:
            table.recovered.update(hits)
        table.lost += lost
        runs += 1
    return table


def main():
    parser = argparse.ArgumentParser(
        description="End runs at random moments, and compare what comes of them."
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--signal", choices=["SIGKILL", "SIGTERM", "SIGINT"], default="SIGKILL")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # A shell that starts this in the background has it ignore Ctrl-C, and so its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder:
        table = campaign(
            options.kills,
            MOMENTS,
            pathlib.Path(folder),
            number=signal.Signals[options.signal],
            seed=options.seed,
        )
    print(f"{options.signal}, seed {options.seed}\n{table}")
    sys.exit(bool(table.lost))


if __name__ == "__main__":
    main()
