"""One contestant in a process of its own, which does what it is told over a pipe and sleeps in between.

Allocator settings hold for a whole process and so do thread pools and caches: a process each keeps the
contestants from changing one another. Only one is told to work at a time.
"""

import contextlib
import importlib
import importlib.metadata
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from _task import Running, Task

PACKAGES = ("jax", "jaxlib", "flax", "optax", "clu", "keras", "torch", "lightning")


def flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Yields the leaves of nested dicts with their paths."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from flat(value, f"{prefix}/{name}" if prefix else str(name))
    else:
        yield prefix, np.asarray(tree)


def versions() -> dict[str, str]:
    """Returns the versions of the packages that this process has imported."""
    found = {}
    for name in PACKAGES:
        if name in sys.modules:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(name)
    if "trainkit" in sys.modules:
        found["trainkit"] = sys.modules["trainkit"].__version__
    return found


def device() -> str:
    """Returns what this process computes on."""
    if "jax" in sys.modules:
        devices = sys.modules["jax"].devices()
        return f"{len(devices)} x {devices[0].device_kind}"
    if "torch" in sys.modules:
        return f"cpu, {sys.modules['torch'].get_num_threads()} threads"
    return "none"


def resident_mib() -> float:
    """Returns the memory that this process holds."""
    with contextlib.suppress(OSError):
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return float("nan")


def donating_programs() -> list[dict[str, Any]]:
    """Returns the memory of each compiled program of this process that takes over buffers of its arguments."""
    found = []
    for program in sys.modules["jax"].devices()[0].client.live_executables():
        stats = program.get_compiled_memory_stats()
        names = ("argument", "output", "alias", "temp")
        sizes = {name: getattr(stats, f"{name}_size_in_bytes") for name in names}
        if sizes["alias"]:
            total = sizes["argument"] + sizes["output"] - sizes["alias"] + sizes["temp"]
            found.append({"name": program.hlo_modules()[0].name, **sizes, "total": total})
    return sorted(found, key=lambda one: -one["total"])


def answer(running: Running, command: dict[str, Any]) -> dict[str, Any]:
    """Does what `command` says and returns what there is to say about it."""
    match command["do"]:
        case "run":
            start = time.perf_counter()
            steps = running.run(command["steps"])
            return {"seconds": time.perf_counter() - start, "steps": steps}
        case "params":
            params = running.params()
            if params is not None:
                np.savez(command["path"], **dict(flat(params)))
            return {"saved": params is not None}
        case "about":
            about = {"versions": versions(), "device": device(), "resident MiB": resident_mib()}
            return {**about, "notes": running.notes()}
        case "programs":
            return {"programs": donating_programs()}
    raise ValueError(f"unknown command {command!r}")


def main() -> None:
    """Makes the contestant named by the arguments, then answers one line of JSON with another."""
    module, key, folder, tmp = sys.argv[1:]
    # What libraries print must not get into the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        running = importlib.import_module(module).CONTESTANTS[key](Task.load(pathlib.Path(folder)), tmp)
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), file=answers)
        return
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        print(json.dumps(answer(running, json.loads(line))), file=answers)


if __name__ == "__main__":
    main()
