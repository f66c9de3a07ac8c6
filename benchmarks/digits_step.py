"""How much a training step costs through trainkit, beside the loop one would write by hand with Flax and CLU.

Both train the same models on the same batches with the same keys. First the parameters after some steps are
compared. Then the loops run in turns, so that a busy machine slows all alike, and each ratio is of two runs
close to one another. The hand-written loop is the fast one: jitted, its state donated, the metrics merged on
the device, nothing read back before the end. A run of one step shows what a fit costs however short it is;
that is in the other times as well.
"""

import argparse
import functools
import importlib.metadata
import io
import json
import pathlib
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import metrics
from flax import linen as nn
from flax.training import train_state
from sklearn.datasets import load_digits

import trainkit as tk

PACKAGES = ("jax", "flax", "optax", "clu", "trainkit")
BATCH_SIZE = 64
COMPARED_STEPS = 200


class CNN(nn.Module):
    """The model of examples/digits.py."""

    @nn.compact
    def __call__(self, x, *, train):
        for features in (32, 64):
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.Dropout(0.5, deterministic=not train)(x.reshape(len(x), -1))
        x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(10)(x)


class MLP(nn.Module):
    """64-128-10: a step of little more than its dispatch."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(nn.Dense(128)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


@flax.struct.dataclass
class Metrics(metrics.Collection):
    """What all loops compute at every step."""

    loss: metrics.Average.from_output("loss")
    accuracy: metrics.Accuracy


class DigitsTrainer(tk.Trainer):
    """The trainkit side."""

    metrics = Metrics

    def loss(self, model, batch, ctx):
        logits = model(batch["image"], train=ctx.train)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses, {"logits": logits, "labels": batch["label"]}


class HandState(train_state.TrainState):
    """The state of the loop by hand; its key is raw, which a jitted call takes faster than a typed one."""

    batch_stats: Any
    rng: jax.Array


class Terminal(io.TextIOBase):
    """A terminal that nobody looks at, so that the progress bar is drawn."""

    def isatty(self):
        return True

    def write(self, text):
        return len(text)


Run = Callable[[int], Any]
"""Trains for so many more steps, and returns the parameters when they are there."""


def digits() -> tk.data.Arrays:
    """Returns the source; each contestant has its own, which holds the order of the running epoch."""
    data = load_digits()
    arrays = {
        "image": (data.images[..., None] / 16).astype(np.float32),
        "label": data.target.astype(np.int32),
    }
    return tk.data.Arrays(arrays, BATCH_SIZE, shuffle=True)


def endless(source: tk.data.Arrays) -> Iterator[Any]:
    """Yields the batches of one epoch after another."""
    epoch = 0
    while True:
        yield from source.batches(epoch)
        epoch += 1


@functools.partial(jax.jit, donate_argnums=(0, 1))
def hand_step(state: HandState, totals: Metrics, batch: Any) -> tuple[HandState, Metrics]:
    """One update, and its metrics merged into `totals`."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)

    def objective(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updated = state.apply_fn(
            variables, batch["image"], train=True, rngs=key, mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses.mean(), (losses, logits, updated.get("batch_stats", {}))

    grads, (losses, logits, stats) = jax.grad(objective, has_aux=True)(state.params)
    new = Metrics.single_from_model_output(loss=losses, logits=logits, labels=batch["label"])
    return state.apply_gradients(grads=grads, batch_stats=stats), totals.merge(new)


def by_hand(model: nn.Module, tx: optax.GradientTransformation, tmp: str) -> Run:
    """Returns the loop written by hand."""
    batches = endless(digits())
    start = DigitsTrainer(model, tx).init(next(endless(digits())))
    state = HandState.create(
        apply_fn=model.apply,
        params=start.params,
        tx=tx,
        batch_stats=start.batch_stats,
        rng=jax.random.key_data(start.rng),
    )
    # A Python int would be weakly typed, and the second step compiled anew.
    state = state.replace(step=jnp.zeros((), jnp.int32))
    totals = Metrics.empty()

    def run(steps: int) -> Any:
        nonlocal state, totals
        for _ in range(steps):
            state, totals = hand_step(state, totals, next(batches))
        return jax.block_until_ready(state).params

    return run


def bare(model: nn.Module, tx: optax.GradientTransformation, tmp: str) -> Run:
    """Returns trainkit's loop with nothing plugged in."""
    trainer = DigitsTrainer(model, tx, callbacks=[tk.callbacks.LogMetrics(every=tk.Never())])
    return _fitting(trainer)


def full(model: nn.Module, tx: optax.GradientTransformation, tmp: str) -> Run:
    """Returns trainkit's loop with an average of the weights, logs every 50 steps and the progress bar."""
    callbacks = [
        tk.callbacks.EMA(0.999),
        tk.callbacks.LogMetrics(every=tk.Every(steps=50)),
        tk.callbacks.Progress(stream=Terminal()),
    ]
    return _fitting(DigitsTrainer(model, tx, callbacks=callbacks, logdir=tmp))


def _fitting(trainer: tk.Trainer) -> Run:
    source = digits()
    return lambda steps: jax.block_until_ready(trainer.fit(source, steps=steps).state).params


CONTESTANTS = {"by hand": by_hand, "bare": bare, "full": full}
TARGETS = {"by hand": None, "bare": 1.03, "full": 1.15}
MODELS = {"cnn": (CNN, 300), "mlp": (MLP, 5_000)}
"""The models, and how many steps of each make one timing."""


def largest_difference(a: Any, b: Any) -> float:
    """Returns the largest absolute difference between two trees."""
    return max(
        float(np.abs(np.asarray(x) - np.asarray(y)).max())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def seconds(run: Run, steps: int) -> float:
    """Returns how long a run of so many steps takes."""
    start = time.perf_counter()
    run(steps)
    return time.perf_counter() - start


def measure(name: str, repeats: int) -> dict[str, Any]:
    """Returns the agreement and the times of all contestants on one model."""
    model, steps = MODELS[name]
    with tempfile.TemporaryDirectory() as tmp:
        runs = {key: make(model(), optax.adam(1e-3), tmp) for key, make in CONTESTANTS.items()}
        # Copied: the next step takes the buffers.
        params = {key: jax.tree.map(np.array, run(COMPARED_STEPS)) for key, run in runs.items()}
        differences = {key: largest_difference(params["by hand"], params[key]) for key in runs}
        times: dict[str, list[float]] = {key: [] for key in runs}
        shortest: dict[str, list[float]] = {key: [] for key in runs}
        for repeat in range(repeats):
            # Whoever is first in one round is last in the next.
            for key in list(runs)[:: 1 if repeat % 2 == 0 else -1]:
                shortest[key].append(seconds(runs[key], 1) * 1e3)
                times[key].append(seconds(runs[key], steps) / steps * 1e6)
    return {
        "steps": steps,
        "differences": differences,
        "microseconds a step": times,
        "milliseconds of a run of one step": shortest,
    }


def table(result: dict[str, Any]) -> str:
    """Returns the quartiles of the times and of the ratios to the hand-written loop, as text."""
    lines = [
        f"{'':8s} {'us/step: median':>16s} {'quartiles':>19s} {'steps/s':>9s} {'ratio: median':>14s}"
        f" {'quartiles':>13s} {'one step, ms':>13s}"
    ]
    hand = np.array(result["microseconds a step"]["by hand"])
    for key, taken in result["microseconds a step"].items():
        low, median, high = np.percentile(taken, (25, 50, 75))
        ratio_low, ratio, ratio_high = np.percentile(np.array(taken) / hand, (25, 50, 75))
        one = np.median(result["milliseconds of a run of one step"][key])
        goal = f"  target {TARGETS[key]}" if TARGETS[key] else ""
        lines.append(
            f"{key:8s} {median:16.1f} {low:9.1f} {high:9.1f} {1e6 / median:9.0f} {ratio:14.3f} "
            f"{ratio_low:6.3f} {ratio_high:6.3f} {one:13.1f}{goal}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures, prints tables, and writes the numbers as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9, help="timings of each loop, at least 7")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--json", type=pathlib.Path, help="file to write all numbers to")
    args = parser.parse_args()

    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    print(f"CPython {platform.python_version()}, " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    print(f"device: {device}; batches of {BATCH_SIZE}")
    results = {}
    for name in args.models:
        results[name] = measure(name, max(7, args.repeats))
        print(f"\n{name}, {results[name]['steps']} steps a timing\n{table(results[name])}")
        for key in ("bare", "full"):
            difference = results[name]["differences"][key]
            said = (
                "bitwise those of the loop by hand"
                if difference == 0
                else f"largest difference {difference:.2e}"
            )
            print(f"parameters after {COMPARED_STEPS} steps, {key}: {said}")
    if args.json:
        report = {
            "python": platform.python_version(),
            "versions": versions,
            "device": device,
            "results": results,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
