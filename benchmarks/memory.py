"""What a training step holds on the device, and what a long fit holds on the host.

On the device: what the compiler planned for the program, arguments and outputs (donated buffers once) and
temporary memory. On the host: what the process holds during one fit of many steps, looked at from outside.
"""

import argparse
import contextlib
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import _data
import _harness
import numpy as np
from _harness import Contestant, Worker

PLANNED = [
    Contestant("by hand"),
    Contestant("by hand, resident", "_inputs"),
    Contestant("trainkit, one a call"),
    Contestant("trainkit"),
    Contestant("by hand, EMA"),
    Contestant("trainkit, EMA", against="by hand, EMA"),
]
HELD = [Contestant("by hand"), Contestant("trainkit"), Contestant("trainkit, all plugged in")]


@contextlib.contextmanager
def started(contestant: Contestant, task: Any) -> Iterator[Worker]:
    """Gives a contestant in its process, alone."""
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        task.save(root / "task")
        worker = Worker(contestant, root / "task", root / "tmp")
        try:
            yield worker
        finally:
            worker.close()


def planned(task: Any, rows: Sequence[Contestant], steps: int) -> dict[str, Any]:
    """Returns the programs of each row that donate, the largest first, after so many steps."""
    found = {}
    for contestant in rows:
        with started(contestant, task) as worker:
            worker.ask("run", steps=steps)
            found[contestant.name] = worker.ask("programs")["programs"]
    return found


def print_planned(found: dict[str, Any]) -> None:
    """Prints the largest program of each row and its ratio to the loop by hand."""
    print(
        f"{'':22s} {'arguments':>11s} {'outputs':>11s} {'donated':>11s} {'temporary':>11s} {'total':>11s}  ratio"
    )
    for contestant in PLANNED:
        if not found.get(contestant.name):
            continue
        largest = found[contestant.name][0]
        total = found[contestant.against or PLANNED[0].name][0]["total"]
        sizes = " ".join(f"{largest[key]:11,d}" for key in ("argument", "output", "alias", "temp", "total"))
        print(f"{contestant.name:22s} {sizes} {largest['total'] / total:6.3f}  {largest['name']}")


def held(task: Any, contestant: Contestant, steps: int, interval: float) -> dict[str, Any]:
    """Returns the MiB that the process of a contestant holds during one run of so many steps, with the times."""
    with started(contestant, task) as worker:
        worker.ask("run", steps=max(4, steps // 50))
        page = os.sysconf("SC_PAGE_SIZE") / 2**20
        statm = pathlib.Path(f"/proc/{worker.pid}/statm")
        samples, start = [], time.monotonic()
        worker.tell("run", steps=steps)
        while not worker.answered(interval):
            samples.append((time.monotonic() - start, int(statm.read_text().split()[1]) * page))
        seconds = worker.read()["seconds"]
        samples.append((seconds, int(statm.read_text().split()[1]) * page))
    return {"steps": steps, "seconds": seconds, "samples": samples}


def slope(found: dict[str, Any]) -> float:
    """Returns by how many KiB per 1000 steps the memory grew in the second half, by least squares."""
    times, sizes = np.array(found["samples"]).T
    late = times > found["seconds"] / 2
    if late.sum() < 2:
        return float("nan")
    per_second = np.polyfit(times[late], sizes[late], 1)[0]
    return float(per_second * found["seconds"] / found["steps"] * 1000 * 1024)


def print_held(name: str, found: dict[str, Any]) -> None:
    """Prints one row."""
    at = [size for _, size in found["samples"]]
    fifth = at[len(at) // 5]
    print(f"{name:26s} {at[0]:8.1f} {fifth:8.1f} {at[-1]:8.1f} {slope(found):16.2f}", flush=True)


def main() -> None:
    """Measures and prints."""
    parser = _harness.arguments(__doc__, ["W1", "W2", "W3", "W4"])
    parser.add_argument("--steps", type=int, default=100_000, help="steps of the fit watched on the host")
    args: argparse.Namespace = parser.parse_args()
    _harness.print_machine(_harness.about_this())
    results: dict[str, Any] = {}
    for name in args.workloads:
        task = _data.task(name, small=args.small, data=args.data)
        found = results[name] = planned(task, _harness.chosen(PLANNED, args), 4 if args.small else 60)
        print(f"\n{name}: bytes of the training step as compiled")
        print_planned(found)
    if not pathlib.Path("/proc/self/statm").exists():
        print("\nno /proc here: what the host holds is not measured")
        return
    steps = 50 if args.small else args.steps
    print(
        f"\nW1: MiB held by the process in one fit of {steps:,} steps: at its start, after a fifth, at the end"
    )
    print(f"{'':26s} {'start':>8s} {'a fifth':>8s} {'end':>8s} {'KiB/1000 steps':>16s}")
    results["held"] = {}
    task = _data.task("W1", small=args.small, data=args.data)
    for contestant in _harness.chosen(HELD, args):
        found = results["held"][contestant.name] = held(task, contestant, steps, 0.02 if args.small else 0.2)
        print_held(contestant.name, found)
    _harness.write_json(args.json, results)


if __name__ == "__main__":
    main()
