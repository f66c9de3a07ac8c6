"""The programs of `tests.same`: trained with whatever trainkit is imported, what they come to goes into a file.

Through the public API alone, so that trees which differ within can both run them. Owns no comparison.
"""

import argparse
import functools
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import metrics
from sklearn.datasets import load_digits

import trainkit as tk

BATCH, STEPS = 64, 12

Result = dict[str, Any]
"""Of one run: `losses`, one a step; `logged`, pairs `[name at a step, value]`; `scores` and `digests` by name. Values
are hexadecimal, so that equal text is equal bits."""


class Cnn(nn.Module):
    """Convolutions with batch statistics, dropout, and two dense layers; of one example or of a batch."""

    features: tuple[int, ...] = (8,)
    axis_name: str | None = "batch"

    @nn.compact
    def __call__(self, x, train):
        for features in self.features:
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=self.axis_name)(x)
            x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        x = nn.Dropout(0.3, deterministic=not train)(x.reshape(*x.shape[:-3], -1))
        return nn.Dense(10, name="head")(nn.relu(nn.Dense(32, name="body")(x)))


@flax.struct.dataclass
class Metrics(metrics.Collection):
    loss: metrics.Average.from_output("loss")
    accuracy: metrics.Accuracy


class Digits(tk.Trainer):
    metrics = Metrics

    def loss(self, model, batch, ctx):
        logits = model(batch["image"], train=ctx.train)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses, {"logits": logits, "labels": batch["label"]}


class Losses(tk.callbacks.Callback):
    """Keeps the loss of each step in the state, where steps run several in one call too."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def step_hook(self) -> tk.hooks.StepHook:
        def init(state):
            return jnp.full(self.steps, jnp.nan, jnp.float32)

        def update(memory, values):
            return memory.at[values.before.step].set(values.loss)

        return tk.hooks.StepHook("losses", init=init, update=update)


@functools.cache
def rows() -> dict[str, dict[str, np.ndarray]]:
    """Returns scikit-learn's digits in three parts: `image` float32 [rows, 8, 8, 1], `label` int32 [rows]."""
    found: Any = load_digits()
    image, label = (found.images[..., None] / 16).astype(np.float32), found.target.astype(np.int32)
    parts = {"train": slice(0, 1200), "valid": slice(1200, 1500), "test": slice(1500, None)}
    return {name: {"image": image[part], "label": label[part]} for name, part in parts.items()}


def train(
    *,
    model: nn.Module | None = None,
    steps: int = STEPS,
    log_every: int = 1,
    steps_per_call: int = 1,
    callbacks: tuple[tk.callbacks.Callback, ...] = (),
    pauses_at: int | None = None,
    predicts: bool = False,
    **options: Any,
) -> Result:
    """Returns what a run comes to.

    Args:
        model: a small CNN by default.
        steps: updates.
        log_every: steps between two values of the log.
        steps_per_call: as `tk.Trainer` has it.
        callbacks: further ones, for a run that does not pause.
        pauses_at: the run ends after that many steps, and another trainer takes it up from the checkpoint.
        predicts: also predict.
        options: of `tk.Trainer`; one device where there is no `strategy`.
    """
    options = {"strategy": tk.parallel.Mesh(devices=jax.devices()[:1]), **options}
    parts = {name: tk.data.Arrays(part, batch_size=BATCH) for name, part in rows().items()}

    def trainer(folder: str) -> Digits:
        own = [Losses(steps), tk.callbacks.LogMetrics(tk.Every(steps=log_every)), *callbacks]
        saving = [tk.callbacks.Checkpoint()] if pauses_at else []
        return Digits(
            model or Cnn(),
            optax.adam(3e-3),
            callbacks=[*own, *saving],
            logdir=folder if pauses_at else None,
            steps_per_call=steps_per_call,
            keep_compiled=False,
            **options,
        )

    with tempfile.TemporaryDirectory() as folder:
        for last in filter(None, (pauses_at, steps)):
            digits = trainer(folder)
            result = digits.fit(
                tk.data.Arrays(rows()["train"], batch_size=BATCH, shuffle=True, seed=1),
                steps=last,
                eval_data=parts["valid"],
                eval_every=tk.Every(steps=steps // 2),
                resume=last == steps and pauses_at is not None,
            )
            if result.stopped_by:
                raise SystemExit(f"the run was broken off by {result.stopped_by}: nothing can be compared.")
        scores = digits.evaluate(parts["test"])
        predicted = digits.predict(parts["test"]) if predicts else ()
    return described(result, scores, predicted)


def described(result: tk.FitResult, scores: Mapping[str, Any], predicted: Any) -> Result:
    state = result.state
    return {
        "losses": [as_hex(loss) for loss in np.asarray(state.hooks["losses"])],
        "logged": [
            [f"{name} at {step}", as_hex(value)]
            for name in sorted(result.history)
            for step, value in result.history[name]
        ],
        "scores": {name: as_hex(value) for name, value in scores.items()},
        "digests": {
            "params": digest(state.params),
            "statistics": digest(state.model_state),
            "optimizer": digest(state.opt_state),
            "hooks": digest(state.hooks),
            "predictions": digest(predicted),
        },
    }


def as_hex(value: Any) -> str:
    return float(value).hex()


def digest(tree: Any) -> str:
    """Returns the SHA-256 of the paths, dtypes, shapes and bytes of all leaves."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        total.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


RULES = [(r"body/kernel", (None, "tensor")), (r"head/kernel", ("tensor", None))]
RUNS: dict[str, Callable[[], Result]] = {
    "digits": lambda: train(
        model=Cnn((32, 64), axis_name=None),
        steps=36,
        predicts=True,
        callbacks=(tk.callbacks.EMA(0.9, debias=True), tk.callbacks.LearningRate(schedule=lambda _: 3e-3)),
    ),
    "vmap": lambda: train(strategy="vmap"),
    "Pmap": lambda: train(strategy=tk.parallel.Pmap()),
    "Mesh(data=8)": lambda: train(strategy=tk.parallel.Mesh(data=8)),
    "Mesh(data=2, fsdp=4)": lambda: train(strategy=tk.parallel.Mesh(data=2, fsdp=4)),
    "Mesh(tensor=2, rules)": lambda: train(strategy=tk.parallel.Mesh(tensor=2, rules=RULES)),
    "accumulate=2": lambda: train(accumulate=2),
    "bfloat16": lambda: train(precision="bfloat16"),
    "float16": lambda: train(precision="float16"),
    "remat": lambda: train(remat=True),
    "steps_per_call=4": lambda: train(log_every=6, steps_per_call=4),
    "resumed": lambda: train(pauses_at=7),
}


def run_here(tree: Path, only: list[str], into: Path) -> None:
    """Writes what the runs come to in this process, whose package must be that of `tree`."""
    place = Path(tk.__file__).resolve()
    if not place.is_relative_to(tree.resolve()):
        raise SystemExit(f"trainkit was imported from {place}, not from {tree}.")
    results = {}
    for name in only:
        start = time.perf_counter()
        results[name] = RUNS[name]()
        print(f"  {name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    into.write_text(json.dumps(results), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tree", type=Path, required=True, help="folder that trainkit must be imported from")
    parser.add_argument("--into", type=Path, required=True, help="file of the results, JSON")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN")
    args = parser.parse_args()
    run_here(args.tree, args.only, args.into)


if __name__ == "__main__":
    main()
