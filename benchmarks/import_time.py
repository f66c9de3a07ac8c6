"""How much longer `import trainkit` takes than importing what it builds on.

Each measurement is a fresh interpreter that times its own imports. The two programs alternate, so that a busy
machine slows both alike, and the medians are compared. The first pair only warms the file cache.
"""

import argparse
import importlib.metadata
import platform
import statistics
import subprocess
import sys

BASELINE = "import jax, flax, optax, clu.metrics"
PROGRAMS = {"baseline": BASELINE, "trainkit": f"{BASELINE}, trainkit"}
PACKAGES = ("jax", "flax", "optax", "clu", "trainkit")


def seconds(imports: str) -> float:
    """Returns how long the statement takes in a fresh interpreter."""
    code = f"import time; start = time.perf_counter(); {imports}; print(time.perf_counter() - start)"
    return float(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )


def measure(repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of each program, `repeats` times, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for repeat in range(repeats + 1):
        for name, imports in PROGRAMS.items():
            taken = seconds(imports)
            if repeat:
                times[name].append(taken)
    return times


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
    times = measure(repeats)
    for name, taken in times.items():
        print(
            f"{name:9s} median {statistics.median(taken):.3f} s, from {min(taken):.3f} to {max(taken):.3f} s"
        )
    ratio = statistics.median(times["trainkit"]) / statistics.median(times["baseline"])
    print(f"ratio {ratio:.3f} (target: at most 1.10), {repeats} pairs")


if __name__ == "__main__":
    main()
