"""Proves that a change of how trainkit is built changes no number: the same runs by two trees, compared bit for bit.

    python -m tests.same --base COMMIT            make same BASE=COMMIT
    python -m tests.same --base COMMIT --only digits Pmap

Each tree trains in a process of its own, on eight forced host devices and through the public API alone; the programs
are those of `tests/helpers/same_runs.py` as it stands, so both run the same. Compared are the loss of every step as the
compiled step has it, every value logged, the metrics of an evaluation, and the digest of the final state. Owns no
tolerance: a change that means to change numbers shows here as different, and says so in its description.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ROOT / "tests" / "helpers" / "same_runs.py"
DEVICES = 8

Result = dict[str, Any]
"""Of one run, as `tests.helpers.same_runs` has it."""


# Two trees --------------------------------------------------------------------------------------------------


def write_tree(commit: str, folder: Path) -> None:
    """Writes the package as it was at `commit` into `folder`.

    Raises:
        SystemExit: there is no such commit.
    """
    command = ["git", "archive", "--format=tar", commit, "--", "trainkit"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if found.returncode:
        raise SystemExit(f"git has no {commit!r}: {found.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(found.stdout)) as archive:
        archive.extractall(folder, filter="data")


def run_tree(tree: Path, only: list[str], folder: Path) -> dict[str, Result]:
    """Returns what the runs come to with the package of `tree`, in a process of its own."""
    into = folder / "results.json"
    forced = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        # A program that both trees compile is compiled once; one that differs has another key.
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_PLATFORMS": "cpu",
        # Collectives on forced host devices deadlock unless XLA's thread pool has two threads per device.
        "NPROC": str(2 * DEVICES),
        "XLA_FLAGS": forced.strip(),
    }
    # -P: the folder of that file is not to be looked up for modules.
    command = [sys.executable, "-P", str(PROGRAMS), "--tree", str(tree), "--into", str(into)]
    done = subprocess.run(
        [*command, *(["--only", *only] if only else [])], cwd=folder, env=environment, check=False
    )
    if done.returncode:
        raise SystemExit(f"the runs of {tree} ended with status {done.returncode}.")
    return json.loads(into.read_text(encoding="utf-8"))


# The comparison ---------------------------------------------------------------------------------------------


def differences(base: Result, here: Result) -> list[str]:
    """Returns in words what differs between two results of one run; nothing where all bits are equal."""
    found = []
    for step, (old, new) in enumerate(zip(base["losses"], here["losses"], strict=False), start=1):
        if old != new:
            found.append(f"loss of step {step}: {by_how_much(old, new)}")
            break
    if len(base["losses"]) != len(here["losses"]):
        found.append(f"{len(here['losses'])} steps, were {len(base['losses'])}")
    for kind in ("logged", "scores"):
        old, new = dict(base[kind]), dict(here[kind])
        if old.keys() != new.keys():
            found.append(f"names that are {kind}: {', '.join(sorted(old.keys() ^ new.keys()))}")
        changed = [name for name in old if name in new and old[name] != new[name]]
        if changed:
            more = f" (and {len(changed) - 1} more)" if changed[1:] else ""
            found.append(f"{kind}: {changed[0]}{more}: {by_how_much(old[changed[0]], new[changed[0]])}")
    changed = [name for name, value in base["digests"].items() if here["digests"].get(name) != value]
    if changed:
        found.append(f"bits of {', '.join(changed)}")
    return found


def by_how_much(old: str, new: str) -> str:
    was, now = float.fromhex(old), float.fromhex(new)
    return f"{now!r}, was {was!r} ({now - was:+.1e})"


def compare(base: Mapping[str, Result], here: Mapping[str, Result]) -> tuple[str, bool]:
    """Returns the table of all runs, and whether they are equal in every bit."""
    lines, equal = ["| run | steps | last loss | compared with the base |", "|---|---|---|---|"], True
    for name, result in here.items():
        found = differences(base[name], result)
        equal = equal and not found
        last = float.fromhex(result["losses"][-1])
        lines.append(f"| {name} | {len(result['losses'])} | {last:.6f} | {'; '.join(found) or 'equal'} |")
    return "\n".join(lines), equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--base", required=True, help="the commit whose numbers are the right ones, e.g. HEAD"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="RUN", help="some of the runs by name")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        old, new = Path(folder) / "base", Path(folder) / "here"
        old.mkdir()
        new.mkdir()
        write_tree(args.base, old)
        print(f"the tree of {args.base}", file=sys.stderr)
        base = run_tree(old, args.only, old)
        print("the work tree", file=sys.stderr)
        here = run_tree(ROOT, args.only, new)
    table, equal = compare(base, here)
    print(table)
    print("\nequal in every bit" if equal else "\nnot the same")
    sys.exit(not equal)


if __name__ == "__main__":
    main()
