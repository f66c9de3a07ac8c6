"""Step time of one model over 1, 2, 4 and 8 forced host devices, the batch divided among them.

Forced devices share the cores of one machine, so this shows what dividing costs, not what devices bring. Each
count is measured in turns with the others; the medians and the ratio to one device are printed.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import time

# Before JAX starts; collectives on forced devices deadlock with fewer threads.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import optax
from flax import linen as nn

import trainkit as tk

COUNTS = (1, 2, 4, 8)


class MLP(nn.Module):
    """512-1024-1024-10."""

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Dense(1024)(x))
        return nn.Dense(10)(x)


class MLPTrainer(tk.Trainer):
    """Cross-entropy on random labels."""

    def loss(self, model, batch, ctx):
        return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"]), {}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--json", type=pathlib.Path, help="file for the figures")
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    data = {
        "x": rng.normal(size=(args.batch_size, 512)).astype(np.float32),
        "y": rng.integers(0, 10, args.batch_size),
    }
    quiet = tk.callbacks.LogMetrics(tk.Never())
    trainers = {
        count: MLPTrainer(
            MLP(),
            optax.adam(1e-3),
            callbacks=[quiet],
            strategy=tk.parallel.Mesh(devices=jax.devices()[:count]),
        )
        for count in COUNTS
    }
    source = [data]
    taken: dict[int, list[float]] = {count: [] for count in COUNTS}
    for repeat in range(args.repeats + 1):
        for count, trainer in trainers.items():
            start = time.perf_counter()
            jax.block_until_ready(trainer.fit(source, steps=args.steps).state.params)
            if repeat:  # the first compiles
                taken[count].append((time.perf_counter() - start) / args.steps * 1e3)

    print(
        f"Python {platform.python_version()}, jax {jax.__version__}, {os.cpu_count()} cores, batch {args.batch_size}"
    )
    medians = {count: statistics.median(times) for count, times in taken.items()}
    for count, median in medians.items():
        print(f"{count} devices: {median:7.2f} ms a step, {median / medians[1]:.2f} of one device")
    if args.json:
        args.json.write_text(json.dumps({"ms": taken, "medians": medians}, indent=1))


if __name__ == "__main__":
    main()
