"""How much longer `import trainkit` takes than importing what it builds on.

Each measurement is a fresh interpreter that imports first what trainkit builds on and then trainkit, and times
both: so a busy machine slows both alike. The first only warms the file cache and writes the bytecode, without
which Python would compile trainkit's source each time.
"""

import argparse
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys

CODE = """
import time
start = time.perf_counter()
import jax, flax, optax, clu.metrics
between = time.perf_counter()
import trainkit
print(between - start, time.perf_counter() - between)
"""
PACKAGES = ("jax", "flax", "optax", "clu", "trainkit")


def seconds() -> tuple[float, float]:
    """Returns how long the imports below trainkit take in a fresh interpreter, and how long trainkit's."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    run = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True, env=environment
    )
    below, own = map(float, run.stdout.split())
    return below, own


def device() -> str:
    """Returns the device JAX would use, asked in a process of its own."""
    code = "import jax; d = jax.devices(); print(len(d), d[0].device_kind)"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def main() -> None:
    """Measures, and prints the versions, the device, both medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9, help="pairs that are counted, at least 7")
    repeats = max(7, parser.parse_args().repeats)

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    print(f"CPython {platform.python_version()}, {versions}")
    print(f"device: {device()}")
    seconds()
    pairs = [seconds() for _ in range(repeats)]
    for name, taken in zip(("below", "trainkit"), zip(*pairs, strict=True), strict=True):
        print(
            f"{name:9s} median {statistics.median(taken):.3f} s, from {min(taken):.3f} to {max(taken):.3f} s"
        )
    ratios = [(below + own) / below for below, own in pairs]
    print(f"ratio {statistics.median(ratios):.3f} (target: at most 1.10), {repeats} processes")


if __name__ == "__main__":
    main()
