"""What saving and restoring cost through trainkit, beside Orbax called by hand.

Both save the same train state, asynchronously, in turns. "Blocked" is how long the training thread waits until it
may go on; "durable" how long until the checkpoint is complete. By hand is `AsyncCheckpointer` with the state and a
small JSON document; trainkit saves the same with all that a resumed run needs, and a checksum of every file, which
it compares before it restores.
"""

import argparse
import importlib.metadata
import json
import pathlib
import platform
import shutil
import tempfile
import time
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn

import trainkit as tk

PACKAGES = ("jax", "flax", "orbax-checkpoint", "trainkit")
SIZES = {"1 MB": 280, "400 MB": 5750}
"""Width of the layer whose parameters and Adam moments make a state of about that size."""


class Regression(tk.Trainer):
    """One square layer."""

    def loss(self, model, batch, ctx):
        return ((model(batch["x"]) - batch["x"]) ** 2).mean(-1), {}


class Timed(tk.callbacks.Checkpoint):
    """Saves at every second step, notes how long that blocks, and waits for the end of each save."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(tk.Every(steps=2), **kwargs)
        self.blocked: list[float] = []
        self.durable: list[float] = []

    def on_step(self, info):
        jax.block_until_ready(info.state)
        return super().on_step(info)

    def save(self, step, make):
        start = time.perf_counter()
        super().save(step, make)
        self.blocked.append(time.perf_counter() - start)
        self.store.wait()
        self.durable.append(time.perf_counter() - start)


class ByHand(tk.callbacks.Callback):
    """The same at the steps between, with Orbax alone."""

    phase = tk.callbacks.Phase.CHECKPOINT

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self.checkpointer = folder, ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self.blocked: list[float] = []
        self.durable: list[float] = []

    def on_step(self, info):
        if info.step % 2 == 0:
            return
        jax.block_until_ready(info.state)
        start = time.perf_counter()
        named = jax.tree_util.tree_leaves_with_path(info.state)
        tree = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in named}
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(tree), host=ocp.args.JsonSave({"step": info.step})
        )
        self.checkpointer.save(self.folder / str(info.step), args=items)
        self.blocked.append(time.perf_counter() - start)
        self.checkpointer.wait_until_finished()
        self.durable.append(time.perf_counter() - start)
        shutil.rmtree(self.folder / str(info.step - 6), ignore_errors=True)


def bytes_of(folder: pathlib.Path) -> int:
    """Returns how much the files in a folder take."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def restored_by_hand(folder: pathlib.Path, step: int, state: Any) -> float:
    """Returns how long Orbax alone takes to restore a state onto the devices."""
    named = jax.tree_util.tree_leaves_with_path(state)
    target = {
        jax.tree_util.keystr(path, simple=True, separator="/"): jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding
        )
        for path, leaf in named
    }
    start = time.perf_counter()
    reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    args = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
    )
    jax.block_until_ready(reader.restore(folder / str(step), args=ocp.args.Composite(state=args)).state)
    return time.perf_counter() - start


def measure(width: int, repeats: int) -> dict[str, Any]:
    """Returns the seconds of saving and restoring, one list each."""
    with tempfile.TemporaryDirectory() as name:
        root = pathlib.Path(name)
        timed, by_hand = Timed(keep=3), ByHand(root / "hand")
        x = np.ones((8, width), np.float32)
        data = [{"x": x}]
        # One trainer for both, whose steps they take in turns.
        trainer = Regression(
            nn.Dense(width), optax.adam(1e-3), logdir=root / "run", callbacks=[by_hand, timed]
        )
        state = trainer.fit(data, steps=2 * repeats + 4).state
        times = {
            "by hand": {"blocked": by_hand.blocked[2:], "durable": by_hand.durable[2:], "restore": []},
            "trainkit": {"blocked": timed.blocked[2:], "durable": timed.durable[2:], "restore": []},
        }
        for _ in range(repeats):
            times["by hand"]["restore"].append(restored_by_hand(root / "hand", 2 * repeats + 3, state))
            start = time.perf_counter()
            trainer.restore(root / "run", step="latest")
            jax.block_until_ready(trainer.state)
            times["trainkit"]["restore"].append(time.perf_counter() - start)
        disk = {"by hand": bytes_of(root / "hand"), "trainkit": bytes_of(root / "run" / "checkpoints")}
        size = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)))
    return {"state bytes": size, "seconds": times, "bytes on disk, the last 3": disk}


def main() -> None:
    """Measures, prints a table, and writes the numbers as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9, help="saves and restores of each")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--json", type=pathlib.Path, help="file to write all numbers to")
    args = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    print(f"CPython {platform.python_version()}, " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    print(f"device: {device}; medians in ms over {args.repeats}, with quartiles")
    results = {}
    for name in args.sizes:
        results[name] = measure(SIZES[name], args.repeats)
        disk = results[name]["bytes on disk, the last 3"]
        print(f"\nstate of {results[name]['state bytes'] / 1e6:.1f} MB")
        for what in ("blocked", "durable", "restore"):
            cells = []
            for who, taken in results[name]["seconds"].items():
                low, median, high = np.percentile(np.array(taken[what]) * 1e3, (25, 50, 75))
                cells.append(f"{who} {median:8.1f} ({low:.1f} to {high:.1f})")
            hand, ours = (np.median(results[name]["seconds"][who][what]) for who in ("by hand", "trainkit"))
            print(f"  {what:8s} {'   '.join(cells)}   ratio {ours / hand:.2f}")
        print("  on disk  " + "   ".join(f"{who} {size / 1e6:.1f} MB" for who, size in disk.items()))
    if args.json:
        report = {"python": platform.python_version(), "versions": versions, "device": device}
        args.json.write_text(json.dumps({**report, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
