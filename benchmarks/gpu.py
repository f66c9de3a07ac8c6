"""The tables of `steps.py` on an accelerator, with a model of ResNet-50's size in bfloat16, and what fusing brings.

Uses the packages of the machine as they are and needs no network; where MNIST and the text are missing, random
data of the same shapes stand in. The process that measures leaves the accelerator to the contestants.
"""

import subprocess
import sys

import _data
import _harness
from _harness import Contestant

WORKLOADS = ["W1", "W2", "W3", "W4", "R50"]
CONTESTANTS = [
    Contestant("by hand"),
    Contestant("by hand, float(loss)"),
    Contestant("by hand, resident", "_inputs"),
    Contestant("trainkit"),
    Contestant("trainkit, one a call"),
    Contestant("trainkit, 4 a call"),
    Contestant("trainkit, 16 a call"),
    Contestant("trainkit, 64 a call"),
    Contestant("trainkit, all plugged in"),
    Contestant("trainkit", against="by hand, resident"),
    Contestant("trainkit, one a call", against="by hand, resident"),
]


def backend() -> str:
    """Returns the backend JAX would use, asked in a process of its own, so that this one holds no memory on it."""
    code = "import jax; print(jax.default_backend())"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return asked.stdout.split()[-1]


def main() -> None:
    """Measures and prints."""
    parser = _harness.arguments(__doc__, WORKLOADS)
    parser.add_argument("--cpu", action="store_true", help="measure on a CPU if there is nothing else")
    parser.add_argument("--batch-size", type=int, help="of R50")
    args = parser.parse_args()
    if backend() == "cpu" and not args.cpu:
        print("JAX finds no accelerator here: nothing is measured. See steps.py, or give --cpu.")
        return
    tasks = {}
    for name in args.workloads:
        options = {"batch_size": args.batch_size} if name == "R50" and args.batch_size else {}
        tasks[name] = _data.task(name, small=args.small, data=args.data, **options)
    _harness.compare(CONTESTANTS, tasks, args)


if __name__ == "__main__":
    main()
