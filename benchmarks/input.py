"""What it costs to get batches to the step: ways to hand over W1's, and a source as slow as the step.

The slow source waits 5 ms for each batch and the step computes for 5 ms; an epoch should take the longer of the
two, not the sum.
"""

import pathlib
import tempfile

import _data
import _harness
from _harness import Contestant
from _task import Task

HAND, RESIDENT, STEP = "by hand", "by hand, resident", "step alone"
HANDING_OVER = [
    Contestant(RESIDENT, "_inputs"),
    Contestant(HAND, "_inputs"),
    Contestant("by hand, device_put", "_inputs"),
    Contestant("by hand, thread", "_inputs"),
    Contestant("trainkit", "_inputs"),
    Contestant("trainkit, host data", "_inputs", targets={"W1": 1.05}),
    Contestant("trainkit, host data", "_inputs", against="trainkit"),
]
SLOW = [
    Contestant(STEP, "_inputs"),
    Contestant("source alone", "_inputs"),
    Contestant("slow source, by hand", "_inputs"),
    Contestant("slow source, float(loss)", "_inputs"),
    Contestant("slow source, trainkit", "_inputs", targets={"": 1.15}),
]
WAIT = 5e-3


def slow_task(loops: int, source: Task) -> Task:
    """Returns the task whose step has so many products to burn time with."""
    return Task("slow source", source.arrays, {**source.options, "loops": loops, "wait": WAIT})


def calibrated(source: Task) -> Task:
    """Returns the task whose step takes as long as a batch: from the times of two numbers of products."""
    few, many = (alone(slow_task(loops, source)) for loops in (50, 250))
    loops = max(1, round(50 + (WAIT - few) * 200 / max(many - few, 1e-6)))
    return slow_task(loops, source)


def alone(task: Task, steps: int = 60) -> float:
    """Returns the shortest time of a step with nothing to wait for."""
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        task.save(root / "task")
        worker = _harness.Worker(Contestant(STEP, "_inputs"), root / "task", root / "tmp")
        try:
            worker.ask("run", steps=3)
            taken = [worker.ask("run", steps=steps)["seconds"] / steps for _ in range(3)]
        finally:
            worker.close()
    return min(taken)


def main() -> None:
    """Measures and prints."""
    args = _harness.arguments(__doc__, ["W1", "W2"]).parse_args()
    tasks = {name: _data.task(name, small=args.small, data=args.data) for name in args.workloads}
    results = _harness.compare(HANDING_OVER, tasks, args)
    source = _data.task("W1", small=args.small, data=args.data)
    task = slow_task(50, source) if args.small else calibrated(source)
    print(
        f"\na step that burns time by {task.options['loops']} products, a source that waits {WAIT * 1e3} ms"
    )
    _harness.compare(SLOW, {"slow source": task}, args, begun=results)


if __name__ == "__main__":
    main()
