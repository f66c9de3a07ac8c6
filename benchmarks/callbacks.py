"""What each callback costs a step of W1: where it is not due, and where it is due every 50 steps."""

import _data
import _harness
from _callbacks import NEVER, NONE, rows
from _harness import Contestant
from _task import Task

# Step hooks are part of every step: what they compute is no matter of being due.
IN_EVERY_STEP = ("NanGuard", "SpikeGuard")
CONTESTANTS = [
    Contestant(NONE, "_callbacks"),
    *[
        Contestant(
            f"{name}, {due}",
            "_callbacks",
            targets={"": 1.01} if due == NEVER and name not in IN_EVERY_STEP else {},
        )
        for name, due in rows()
    ],
]


def main() -> None:
    """Measures and prints."""
    parser = _harness.arguments(__doc__)
    parser.add_argument(
        "--calls", nargs="+", type=int, default=[1, 50], help="steps of a call, one table each"
    )
    args = parser.parse_args()
    digits = _data.task("W1", small=args.small, data=args.data)
    tasks = {
        f"{calls} a call": Task(digits.name, digits.arrays, {**digits.options, "steps_per_call": calls})
        for calls in args.calls
    }
    _harness.compare(CONTESTANTS, tasks, args)


if __name__ == "__main__":
    main()
