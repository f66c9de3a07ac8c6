"""Time from `python script.py` to the first finished step of W4, each in a fresh process, in turns.

Cold: no compilation cache exists. Warm: the same script ran before and left its cache, where it keeps one.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

import _data
import _harness
import numpy as np

BY_HAND, CAREFUL, CACHED, TRAINKIT = (
    "by hand, as in Flax's guides",
    "by hand, initialisation jitted",
    "by hand, jitted, with JAX's cache",
    "trainkit",
)
ROWS = {"cold": (BY_HAND, CAREFUL, TRAINKIT), "warm": (BY_HAND, CAREFUL, CACHED, TRAINKIT)}
GOALS = {"cold": 0.80, "warm": 0.50}


def command(row: str, args: argparse.Namespace, kept: pathlib.Path) -> list[str]:
    """Returns the command line of a row, which keeps what it keeps below `kept`."""
    here, size = pathlib.Path(__file__).resolve().parent, "small" if args.small else "full"
    if row == TRAINKIT:
        script = [here / "_first_step_trainkit.py", size, args.data, kept / "logdir"]
    else:
        how = "eager" if row == BY_HAND else "jitted"
        cache = [kept / "cache"] if row == CACHED else []
        script = [here / "_first_step_by_hand.py", how, size, args.data, *cache]
    return [sys.executable, *map(str, script)]


def seconds(row: str, args: argparse.Namespace, kept: pathlib.Path) -> float:
    """Returns how long one fresh process takes to its first finished step."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    paths = [str(_data.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # What is kept between runs, wherever below the user's cache folder it is, is kept here.
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "XDG_CACHE_HOME": str(kept / "home")}
    kept.mkdir(parents=True, exist_ok=True)
    with (kept / "log").open("w") as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            command(row, args, kept),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
        assert process.stdout is not None
        assert process.stdin is not None
        line = process.stdout.readline()
        taken = time.perf_counter() - start
        finish(process, row)
    if "first step done" not in line:
        raise RuntimeError(f"{row}: no first step. {(kept / 'log').read_text()[-3000:]}")
    return taken


def finish(process: subprocess.Popen[str], row: str) -> None:
    """Ends a script; trainkit's by the signal on which it closes what it wrote."""
    assert process.stdin is not None
    process.stdin.close()
    if row == TRAINKIT:
        process.terminate()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def measure(kind: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Returns the seconds of all rows, cold or warm."""
    rows = [row for row in ROWS[kind] if row == BY_HAND or row in args.only]
    taken: dict[str, list[float]] = {row: [] for row in rows}
    repeats = 1 if args.small else max(_harness.LEAST_REPEATS, args.repeats)
    with tempfile.TemporaryDirectory() as folder:
        places = {row: pathlib.Path(folder) / str(index) for index, row in enumerate(taken)}
        for repeat in range(repeats + 1):
            for row in list(taken)[:: 1 if repeat % 2 == 0 else -1]:
                if kind == "cold":
                    shutil.rmtree(places[row], ignore_errors=True)
                found = seconds(row, args, places[row])
                if repeat:  # the first fills the caches, those of files and bytecode as well
                    taken[row].append(found)
    return taken


def table(kind: str, taken: dict[str, list[float]]) -> str:
    """Returns the rows as text, with ratios to each of the scripts by hand."""
    lines = [f"{kind:36s} {'s':>6s} {'quartiles':>13s}  ratios to the rows by hand, in their order"]
    by_hand = [row for row in taken if row != TRAINKIT]
    for row, times in taken.items():
        low, median, high = _harness.quartiles(times)
        ratios = [float(np.median(np.array(times) / np.array(taken[other]))) for other in by_hand]
        goal = f"  goal {GOALS[kind]} of the first" if row == TRAINKIT else ""
        said = " ".join(f"{ratio:6.3f}" for ratio in ratios)
        lines.append(f"{row:36s} {median:6.2f} {low:6.2f} {high:6.2f}  {said}{goal}")
    return "\n".join(lines)


def main() -> None:
    """Measures and prints."""
    parser = _harness.arguments(__doc__)
    parser.set_defaults(only=ROWS["warm"])
    parser.add_argument("--kinds", nargs="+", choices=ROWS, default=list(ROWS))
    args = parser.parse_args()
    results: dict[str, Any] = {}
    _harness.print_machine(_harness.about_this())
    for kind in args.kinds:
        results[kind] = measure(kind, args)
        print(f"\n{table(kind, results[kind])}", flush=True)
        _harness.write_json(args.json, results)


if __name__ == "__main__":
    main()
