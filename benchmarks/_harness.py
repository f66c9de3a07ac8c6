"""Runs contestants in turns, each in a process of its own, and reports medians, quartiles and ratios.

Owns the measuring; what is measured is in `_contestants.py` and the files of the peers.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import _data
import numpy as np
from _task import Task

HERE = pathlib.Path(__file__).resolve().parent
LEAST_REPEATS = 7
# Compilation takes one, and what decides by measuring takes as many as that takes.
_MOST_WARM_UPS = 30
COMPARED_STEPS = {"W1": 200}
"""Steps after which the parameters are compared; else 20."""


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One row of a table.

    Attributes:
        name: key in `CONTESTANTS` of its module, and the name of the row.
        module: where it is made.
        against: row that its own ratio is to; the first row where None.
        targets: the most its ratio to `against` may be, by workload; "" for all others.
        python: interpreter, where not this one.
        options: of the task, where they differ from the others'.
    """

    name: str
    module: str = "_contestants"
    against: str | None = None
    targets: Mapping[str, float] = dataclasses.field(default_factory=dict)
    python: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Missing(Exception):
    """A contestant can't be made here, because a package is not installed."""


class Worker:
    """One contestant in its process."""

    def __init__(self, contestant: Contestant, task: pathlib.Path, tmp: pathlib.Path) -> None:
        self.name, self._tmp = contestant.name, tmp
        tmp.mkdir(parents=True)
        # Several processes share a GPU: none may take it all. The tree's own trainkit is measured.
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
        # Each compiles what it runs; the user's cache is left alone.
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        paths = [str(_data.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        python = contestant.python or sys.executable
        with (tmp / "log").open("w") as log:
            self._process = subprocess.Popen(
                [python, HERE / "_worker.py", contestant.module, contestant.name, task, tmp],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        ready = self.read()
        if "missing" in ready:
            self.close()
            raise Missing(ready["missing"])

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        """Returns the answer to one command."""
        self.tell(do, **values)
        return self.read()

    def tell(self, do: str, **values: Any) -> None:
        """Sends one command, whose answer is to be read."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **values}) + "\n")
        self._process.stdin.flush()

    def answered(self, timeout: float) -> bool:
        """Returns whether there is something to read within so many seconds."""
        return bool(select.select([self._process.stdout], [], [], timeout)[0])

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def read(self) -> dict[str, Any]:
        """Returns the next answer."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            log = (self._tmp / "log").read_text()[-3000:]
            raise RuntimeError(f"the process of {self.name!r} ended with {self._process.wait()}:\n{log}")
        return json.loads(line)


def arguments(description: str, workloads: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Returns the options that all scripts have."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9, help=f"timings of each, at least {LEAST_REPEATS}")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one timing of the first row")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows to measure beside the first")
    parser.add_argument("--json", type=pathlib.Path, help="file to write all numbers to")
    parser.add_argument("--data", type=pathlib.Path, default=_data.DATA, help="folder with the real data")
    parser.add_argument(
        "--small", action="store_true", help="tiny sizes and two timings: only to see it work"
    )
    if workloads:
        parser.add_argument("--workloads", nargs="+", choices=workloads, default=list(workloads))
    return parser


def measure(task: Task, contestants: Sequence[Contestant], args: argparse.Namespace) -> dict[str, Any]:
    """Returns everything measured of one workload: times a step by row, differences, notes."""
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        workers, left_out = _started(task, chosen(contestants, args), root)
        try:
            return {"left out": left_out, **_measured(task, workers, root, args)}
        finally:
            for worker in workers.values():
                worker.close()


def chosen(contestants: Sequence[Contestant], args: argparse.Namespace) -> list[Contestant]:
    """Returns the rows asked for, the first, and those that these are compared with."""
    if args.only is None:
        return list(contestants)
    wanted = {contestants[0].name, *args.only}
    wanted |= {one.against for one in contestants if one.name in wanted and one.against}
    return [one for one in contestants if one.name in wanted]


def _started(
    task: Task, contestants: Sequence[Contestant], root: pathlib.Path
) -> tuple[dict[str, Worker], dict[str, str]]:
    workers: dict[str, Worker] = {}
    left_out: dict[str, str] = {}
    for number, contestant in enumerate(contestants):
        if contestant.name in workers:  # a row that is compared twice
            continue
        folder = root / f"task{number}"
        task._replace(options={**task.options, **contestant.options}).save(folder)
        try:
            workers[contestant.name] = Worker(contestant, folder, root / f"tmp{number}")
        except Missing as error:
            left_out[contestant.name] = str(error)
    return workers, left_out


def _measured(
    task: Task, workers: dict[str, Worker], root: pathlib.Path, args: argparse.Namespace
) -> dict[str, Any]:
    compared = 4 if args.small else COMPARED_STEPS.get(task.name, 20)
    differences = _differences(workers, compared, root)
    steps = _steps(next(iter(workers.values())), args)
    for worker in workers.values():
        for runs in range(1 if args.small else _MOST_WARM_UPS):
            worker.ask("run", steps=steps)
            if runs and "being measured" not in str(worker.ask("about")["notes"]):
                break
    times: dict[str, list[float]] = {name: [] for name in workers}
    for repeat in range(2 if args.small else max(LEAST_REPEATS, args.repeats)):
        # Whoever is first in one round is last in the next.
        for name in list(workers)[:: 1 if repeat % 2 == 0 else -1]:
            taken = workers[name].ask("run", steps=steps)
            times[name].append(taken["seconds"] / taken["steps"])
    return {
        "steps": steps,
        "compared steps": compared,
        "differences": differences,
        "seconds a step": times,
        "about": {name: worker.ask("about") for name, worker in workers.items()},
    }


def _steps(first: Worker, args: argparse.Namespace) -> int:
    """Returns how many steps make one timing."""
    if args.small:
        return 4
    steps = 10
    while True:
        taken = first.ask("run", steps=steps)
        if taken["seconds"] > args.seconds / 4:
            return max(10, round(args.seconds * steps / taken["seconds"]))
        steps *= 4


def _differences(workers: dict[str, Worker], steps: int, root: pathlib.Path) -> dict[str, float]:
    """Returns the largest difference of any parameter from the first row's after the same steps."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for number, (name, worker) in enumerate(workers.items()):
        path = root / f"params{number}.npz"
        worker.ask("run", steps=steps)
        if worker.ask("params", path=str(path))["saved"]:
            with np.load(path) as held:
                found[name] = dict(held)
    if not found:
        return {}
    first = next(iter(found.values()))
    return {
        name: max(float(np.abs(first[leaf] - params[leaf]).max()) for leaf in first)
        for name, params in found.items()
        if params.keys() == first.keys()
    }


def quartiles(values: Any) -> tuple[float, float, float]:
    """Returns the lower quartile, the median and the upper quartile."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return float(low), float(median), float(high)


def table(result: dict[str, Any], contestants: Sequence[Contestant], workload: str) -> str:
    """Returns the rows of one workload as text."""
    times = {name: np.array(taken) for name, taken in result["seconds a step"].items()}
    first = next(iter(times))
    unit, scale = ("us", 1e6) if np.median(times[first]) < 1e-3 else ("ms", 1e3)
    width = max(map(len, times)) + 1
    head = f"{unit}/step"
    lines = [
        f"{'':{width}s} {head:>9s} {'quartiles':>17s} {'ratio':>6s} {'quartiles':>13s} {'goal':>6s}  against"
    ]
    for one in contestants:
        if one.name not in times:
            continue
        against = one.against or first
        low, median, high = quartiles(times[one.name] * scale)
        left = f"{one.name:{width}s} {median:9.2f} {low:8.2f} {high:8.2f}"
        if against not in times:
            lines.append(left)
            continue
        ratio_low, ratio, ratio_high = quartiles(times[one.name] / times[against])
        goal = one.targets.get(workload, one.targets.get(""))
        said = f"{goal:6.2f}" if goal else " " * 6
        lines.append(f"{left} {ratio:6.3f} {ratio_low:6.3f} {ratio_high:6.3f} {said}  {against}")
    return "\n".join(lines)


def remarks(result: dict[str, Any]) -> str:
    """Returns what there is to say below a table: agreement, choices made, rows left out."""
    lines = []
    for name, difference in list(result["differences"].items())[1:]:
        same = "bitwise the same" if difference == 0 else f"within {difference:.1e}"
        lines.append(f"parameters after {result['compared steps']} steps, {name}: {same}")
    for name, about in result["about"].items():
        lines += [f"{name}: {key} {value}" for key, value in about["notes"].items() if value]
    lines += [f"left out: {name} ({why})" for name, why in result["left out"].items()]
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    """Returns what is known of this machine."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "libc": " ".join(platform.libc_ver()),
        "time": time.strftime("%Y-%m-%d %H:%M"),
    }


def about_this() -> dict[str, dict[str, Any]]:
    """Returns the device and the versions as a contestant would, asked in a process of its own."""
    code = "import json, flax, jax, optax, clu, trainkit, _worker as w; print(json.dumps([w.versions(), w.device()]))"
    paths = os.pathsep.join([str(HERE), str(_data.ROOT), os.environ.get("PYTHONPATH", "")])
    asked = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    versions, device = json.loads(asked.stdout.splitlines()[-1])
    return {"": {"versions": versions, "device": device}}


def print_machine(about: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints the machine, and the device and the versions that the contestants found."""
    machine = environment()
    print(f"CPython {machine['python']}, {machine['platform']}, {machine['cores']} cores, {machine['libc']}")
    seen = set()
    for one in about.values():
        line = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
        line = f"device: {one['device']}; {line}"
        if line not in seen:
            print(line)
            seen.add(line)


def compare(
    contestants: Sequence[Contestant],
    tasks: Mapping[str, Task],
    args: argparse.Namespace,
    *,
    begun: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measures, prints tables, writes JSON where asked, and returns the results by title, after those `begun`."""
    results: dict[str, Any] = dict(begun or {})
    for title, task in tasks.items():
        result = results[title] = measure(task, contestants, args)
        if len(results) == 1:
            print_machine(result["about"])
        said = f"{title}: {_data.DESCRIPTIONS.get(task.name, task.name)}"
        print(
            f"\n{said}, batches of {task.options['batch_size']}, {task.options.get('source', 'made up')}; ",
            end="",
        )
        print(f"{result['steps']} steps a timing\n{table(result, contestants, task.name)}")
        print(remarks(result), flush=True)
        write_json(args.json, results)
    return results


def write_json(path: pathlib.Path | None, results: Any) -> None:
    """Writes the results with the machine they are of, where a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": environment(), "results": results}, indent=1) + "\n")
