"""Whether the cost of a step grows: with the leaves of the parameters, the callbacks, the steps of a fit."""

import itertools
import pathlib
import tempfile
from typing import Any

import _data
import _harness
import numpy as np
from _growing import CALLBACKS
from _harness import Contestant
from _task import Task

LEAVES = (10, 100, 1000)
TUNED = "by hand, CPU settings"
BY_LEAVES = [
    Contestant("by hand", "_growing"),
    Contestant(TUNED, "_growing"),
    Contestant("trainkit", "_growing", targets={"": 1.05}),
    Contestant("trainkit, one a call", "_growing", against=TUNED, targets={"": 1.05}),
    Contestant("trainkit, one a call, no CPU settings", "_growing", targets={"": 1.05}),
]
BY_CALLBACKS = [Contestant(f"trainkit, {count} callbacks", "_growing") for count in CALLBACKS]
LENGTHS = (1_000, 10_000, 100_000)


def by_length(task: Task, lengths: tuple[int, ...], repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of fits of each length, in turns."""
    taken: dict[str, list[float]] = {str(length): [] for length in lengths}
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        task.save(root / "task")
        worker = _harness.Worker(Contestant("trainkit"), root / "task", root / "tmp")
        try:
            worker.ask("run", steps=lengths[0])
            for _ in range(repeats):
                for length in lengths:
                    taken[str(length)].append(worker.ask("run", steps=length)["seconds"])
        finally:
            worker.close()
    return taken


def print_by_length(taken: dict[str, list[float]]) -> None:
    """Prints what a step more costs between one length of a fit and the next."""
    print("\nfits of several lengths on W1: what each step beyond the shorter fit takes")
    lengths = list(taken)
    for shorter, longer in itertools.pairwise(lengths):
        more = (np.array(taken[longer]) - np.array(taken[shorter])) / (int(longer) - int(shorter))
        low, median, high = _harness.quartiles(more * 1e6)
        print(f"{int(shorter):>9,d} to {int(longer):>9,d} steps {median:9.2f} us ({low:.2f} to {high:.2f})")


def main() -> None:
    """Measures and prints."""
    parser = _harness.arguments(__doc__)
    parser.add_argument("--leaves", nargs="+", type=int, default=list(LEAVES))
    args = parser.parse_args()
    digits = _data.task("W1", small=args.small, data=args.data)
    tasks = {
        f"{count} leaves": Task("leaves", digits.arrays, {**digits.options, "leaves": count})
        for count in args.leaves
    }
    results: dict[str, Any] = _harness.compare(BY_LEAVES, tasks, args)
    results = _harness.compare(BY_CALLBACKS, {"callbacks not due": digits}, args, begun=results)
    lengths, repeats = ((4, 8), 2) if args.small else (LENGTHS, max(_harness.LEAST_REPEATS, args.repeats))
    results["seconds by steps"] = by_length(digits, lengths, repeats)
    print_by_length(results["seconds by steps"])
    _harness.write_json(args.json, results)


if __name__ == "__main__":
    main()
