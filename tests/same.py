"""Proves that a change of how trainkit is built changes no number: the same runs by two trees, compared bit for bit.

    python -m tests.same --base COMMIT            make same BASE=COMMIT
    python -m tests.same --base COMMIT --only digits Pmap

Each tree trains in a process of its own, on eight forced host devices and through the public API alone; the programs
stand in this file, so both run the same. Compared are the loss of every step as the compiled step has it, every value
logged, the metrics of an evaluation, and the digest of the final state. Owns no tolerance: a change that means to
change numbers shows here as different, and says so in its description.
"""

import argparse
import functools
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
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

ROOT = Path(__file__).resolve().parents[1]
DEVICES = 8
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
    # -P: the folder of this file is not to be looked up for modules.
    command = [sys.executable, "-P", __file__, "--into", str(into), "--tree", str(tree), "--only", *only]
    subprocess.run(command, cwd=folder, env=environment, check=True)
    return json.loads(into.read_text(encoding="utf-8"))


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
    parser.add_argument("--base", help="the commit whose numbers are the right ones")
    parser.add_argument(
        "--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN", help=f"of {', '.join(RUNS)}"
    )
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tree", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.into:
        run_here(args.tree, args.only, args.into)
        return
    if not args.base:
        parser.error(
            "--base COMMIT is missing: the commit before the change, e.g. HEAD for what is not committed yet"
        )
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
