"""Trains a small CNN on handwritten digits: scikit-learn's 1,797 of 8 x 8 pixels, or MNIST files of your own.

python examples/digits.py
python examples/digits.py --data-dir ~/mnist --epochs 5
"""

import argparse
import functools
import pathlib
import time
from typing import Any

import flax
import jax
import numpy as np
import optax
from clu import metrics
from flax import linen as nn
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.metrics import ConfusionMatrixDisplay
from sklearn.model_selection import train_test_split

import trainkit as tk

Examples = dict[str, Any]
"""`image` float32 [examples, height, width, 1] in [0, 1], and `label` int32 [examples]."""


class CNN(nn.Module):
    """Two convolutions with batch normalisation, then two dense layers after dropout."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        for features in (32, 64):
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.Dropout(0.5, deterministic=not train)(x.reshape(len(x), -1))
        x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(10)(x)


@flax.struct.dataclass
class Metrics(metrics.Collection):
    loss: metrics.Average.from_output("loss")
    accuracy: metrics.Accuracy


class DigitsTrainer(tk.Trainer):
    metrics = Metrics

    def loss(self, model, batch, ctx):
        logits = model(batch["image"], train=ctx.train)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses, {"logits": logits, "labels": batch["label"]}


class Pictures(tk.callbacks.Callback):
    """Draws what became of the test images at the end: the confusion matrix, and the hardest of them."""

    # Last of all, so that early stopping has put the best state back.
    phase = tk.callbacks.Phase.CHECKPOINT

    def __init__(self, test: Examples) -> None:
        self.images, self.labels = test["image"], test["label"]

    def on_fit_end(self, info: tk.callbacks.Info) -> None:
        state = tk.callbacks.EMA.view(info.state)
        predict = jax.jit(functools.partial(state.apply_fn, state.variables, train=False))
        pieces = np.array_split(self.images, 1 + len(self.images) // 1000)
        logits = np.concatenate([predict(piece) for piece in pieces])
        guesses = logits.argmax(axis=-1)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, self.labels)

        matrix = Figure(figsize=(4, 4), dpi=150, layout="constrained")
        ConfusionMatrixDisplay.from_predictions(
            self.labels, guesses, ax=matrix.add_subplot(), cmap="Blues", colorbar=False
        )
        hardest = Figure(figsize=(4, 4), dpi=150, layout="constrained")
        for axes, index in zip(hardest.subplots(3, 4).flat, np.argsort(-losses), strict=False):
            label, guess = self.labels[index], guesses[index]
            colour = "green" if guess == label else "red"
            axes.set_title(f"{label}, read as {guess}", size="small", color=colour)
            axes.imshow(self.images[index, ..., 0], cmap="gray_r")
            axes.set_axis_off()
        pictures = {"test/confusion_matrix": pixels(matrix), "test/hardest": pixels(hardest)}
        info.writer.write_images(info.step, pictures)


def pixels(figure: Figure) -> np.ndarray:
    """Returns a figure as an image, uint8 [height, width, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def examples_of(images: np.ndarray, labels: np.ndarray) -> Examples:
    scaled = images[..., None] / images.max()
    return {"image": scaled.astype(np.float32), "label": labels.astype(np.int32)}


def hold_out(examples: Examples, share: float) -> tuple[Examples, Examples]:
    """Splits a share off: the same one in every run, with all digits in proportion."""
    parts = train_test_split(*examples.values(), test_size=share, stratify=examples["label"], random_state=0)
    return dict(zip(examples, parts[::2], strict=True)), dict(zip(examples, parts[1::2], strict=True))


def read_mnist(folder: pathlib.Path, part: str, limit: int | None) -> Examples | None:
    """Returns the examples of "train" or "t10k", None where the folder has no such files."""
    files = sorted(folder.glob(f"{part}-*ubyte*"))  # images, then labels
    return examples_of(*(tk.data.read_idx(file)[:limit] for file in files)) if files else None


def load(folder: pathlib.Path | None, limit: int | None) -> tuple[Examples, Examples]:
    """Returns the examples to train with, and those held out to test with."""
    if folder is None:
        digits: Any = load_digits()
        return hold_out(examples_of(digits.images[:limit], digits.target[:limit]), 1 / 5)
    train, test = read_mnist(folder, "train", limit), read_mnist(folder, "t10k", limit)
    if test is None:
        raise SystemExit(f"{folder} has no t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, plain or .gz.")
    return (train, test) if train else hold_out(test, 1 / 5)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a small CNN on handwritten digits.")
    parser.add_argument("--data-dir", type=pathlib.Path, help="folder of MNIST's IDX files, plain or .gz")
    parser.add_argument("--logdir", type=pathlib.Path, default="runs/digits", help="folder of all runs")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="at its highest, after the warm-up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="read that many examples only")
    args = parser.parse_args()

    train, test = load(args.data_dir, args.limit)
    train, valid = hold_out(train, 1 / 10)
    train_data = tk.data.Arrays(train, args.batch_size, shuffle=True, seed=args.seed)
    steps = args.epochs * len(train_data)
    schedule = optax.warmup_cosine_decay_schedule(0.0, args.learning_rate, steps // 10, steps)
    hparams = {name: getattr(args, name) for name in ("learning_rate", "batch_size", "epochs", "seed")}

    trainer = DigitsTrainer(
        CNN(),
        optax.adam(schedule),
        seed=args.seed,
        logdir=args.logdir / time.strftime("%m%d-%H%M%S"),
        callbacks=[
            tk.callbacks.Progress(),
            tk.callbacks.EMA(0.98, debias=True),
            tk.callbacks.EarlyStopping("eval/loss", patience=10, restore_best=True),
            tk.callbacks.LogMetrics(tk.Every(epochs=1)),
            tk.callbacks.LearningRate(tk.Every(epochs=1), schedule=schedule, name="train/learning_rate"),
            tk.callbacks.Lambda(on_fit_start=lambda info: info.writer.write_hparams(hparams)),
            Pictures(test),
        ],
    )
    result = trainer.fit(train_data, epochs=args.epochs, eval_data=tk.data.Arrays(valid, args.batch_size))
    scores = trainer.evaluate(tk.data.Arrays(test, args.batch_size))

    print(
        f"state of step {result.step} after {result.seconds:.1f} s: {result.stopped_by or 'all epochs done'}"
    )
    print("test " + ", ".join(f"{name} {score:.4f}" for name, score in scores.items()))
    print(f"tensorboard --logdir {args.logdir}")


if __name__ == "__main__":
    main()
