"""How long a training step takes: by hand, through trainkit, and in other frameworks.

Every loop trains the same model on the same batches from the same weights and computes loss and accuracy at each
step. Ratios are to the loop by hand, or to the row named at the end of the line.
"""

import _data
import _harness
from _harness import Contestant

HAND, TUNED, TORCH = "by hand", "by hand, CPU settings", "torch by hand"


def contestants(peers: str | None, fixed: bool) -> list[Contestant]:
    """Returns the rows of the table."""
    rows = [
        Contestant(HAND),
        Contestant("by hand, float(loss)"),
        Contestant(TUNED),
        Contestant("trainkit", targets={"W1": 0.40, "": 0.75}),
        Contestant("trainkit, as it comes"),
        Contestant("trainkit, one a call", against=TUNED, targets={"": 1.03}),
        Contestant("trainkit, one a call, no CPU settings", targets={"": 1.03}),
        Contestant("trainkit, all plugged in", targets={"W1": 0.50, "": 1.02}),
    ]
    if fixed:
        rows += [Contestant(f"trainkit, {k} a call", against="trainkit") for k in (2, 4, 8, 16, 32, 64)]
    rows += [
        Contestant("Keras", "_peer_keras", python=peers),
        Contestant("Keras, 10 steps per execution", "_peer_keras", python=peers),
        Contestant(TORCH, "_peer_torch", python=peers),
        Contestant("Lightning", "_peer_torch", against=TORCH, python=peers),
        Contestant("Lightning, self.log", "_peer_torch", against=TORCH, python=peers),
    ]
    return rows


def main() -> None:
    """Measures and prints."""
    parser = _harness.arguments(__doc__, ["W1", "W2", "W3", "W4"])
    parser.add_argument(
        "--peers-python", help="interpreter that has keras, torch and lightning; else this one"
    )
    parser.add_argument("--fixed", action="store_true", help="fixed numbers of steps per call as well")
    args = parser.parse_args()
    rows = contestants(args.peers_python, args.fixed)
    tasks = {name: _data.task(name, small=args.small, data=args.data) for name in args.workloads}
    results = _harness.compare(rows, tasks, args)
    for name, result in results.items():
        times = result["seconds a step"]
        if TUNED in times and "trainkit" in times:
            ratios = [a / b for a, b in zip(times["trainkit"], times[TUNED], strict=True)]
            low, median, high = _harness.quartiles(ratios)
            goal = 0.70 if name == "W1" else 0.97
            print(f"{name}: trainkit / {TUNED} {median:.3f} ({low:.3f} to {high:.3f}), goal {goal}")


if __name__ == "__main__":
    main()
