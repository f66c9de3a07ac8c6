"""How long a batch of evaluation takes: by hand, and through `Trainer.evaluate`.

Both go over the same data in order, merge loss and accuracy on the device and compute them at the end of each
pass; the ratio of a short pass shows what the pass itself costs.
"""

import _data
import _harness
from _harness import Contestant

CONTESTANTS = [
    Contestant("evaluation by hand"),
    Contestant("evaluation, trainkit", targets={"": 1.03}),
]
TILES = 20


def main() -> None:
    """Measures and prints."""
    args = _harness.arguments(__doc__, ["W1", "W2", "W3", "W4"]).parse_args()
    tasks = {}
    for name in args.workloads:
        tasks[name] = _data.task(name, small=args.small, data=args.data)
        if name == "W1" and not args.small:
            tasks[f"W1, {TILES} times the data"] = _data.task(name, data=args.data, tile=TILES)
    _harness.compare(CONTESTANTS, tasks, args)


if __name__ == "__main__":
    main()
