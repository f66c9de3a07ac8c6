"""Trains a small CNN on handwritten digits: scikit-learn's 1,797 of 8 x 8 pixels, or MNIST files of your own.

python examples/digits.py
python examples/digits.py --data-dir ~/mnist --epochs 5
"""

import argparse
import pathlib
import time

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

Examples = dict[str, np.ndarray]
"""`image` float32 [examples, height, width, 1] in [0, 1], and `label` int32 [examples]."""


class CNN(nn.Module):
    """Two stages of convolutions, then two dense layers."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        for features in (32, 64):
            for _ in range(2):
                x = nn.Conv(features, (3, 3), use_bias=False)(x)
                x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(128)(x.reshape(len(x), -1)))
        x = nn.Dropout(0.5, deterministic=not train)(x)
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
    """At the end, draws what became of `examples`: the confusion matrix, and the digits it found hardest."""

    # After the monitors, of which early stopping puts the best weights back.
    phase = tk.callbacks.Phase.CHECKPOINT

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def on_fit_end(self, info: tk.callbacks.Info) -> None:
        state, labels = tk.callbacks.EMA.view(info.state), self.examples["label"]
        predict = jax.jit(state.apply_fn, static_argnames="train")
        chances = np.asarray(nn.softmax(predict(state.variables, self.examples["image"], train=False)))
        guesses = chances.argmax(axis=-1)
        hardest = chances[np.arange(len(labels)), labels].argsort()[:18]

        matrix = Figure(figsize=(6, 6), layout="constrained")
        ConfusionMatrixDisplay.from_predictions(
            labels, guesses, ax=matrix.add_subplot(), cmap="Blues", colorbar=False
        )
        digits = Figure(figsize=(9, 5.5), layout="constrained")
        for axes, index in zip(digits.subplots(3, 6).flat, hardest):
            right = guesses[index] == labels[index]
            axes.set_title(f"{labels[index]}, read as {guesses[index]}", color="black" if right else "red")
            axes.imshow(self.examples["image"][index, ..., 0], cmap="gray_r")
            axes.set_axis_off()
        pictures = {"test/confusion": pixels(matrix), "test/hardest": pixels(digits)}
        info.writer.write_images(info.step, pictures)


def pixels(figure: Figure) -> np.ndarray:
    """Returns the figure as uint8 [height, width, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def examples_of(images: np.ndarray, labels: np.ndarray) -> Examples:
    scaled = images[..., None] / images.max()
    return {"image": scaled.astype(np.float32), "label": labels.astype(np.int32)}


def cut(examples: Examples, share: float) -> tuple[Examples, Examples]:
    """Cuts a share off, the same at each run, with every digit in proportion."""
    pieces = train_test_split(*examples.values(), test_size=share, stratify=examples["label"], random_state=0)
    return dict(zip(examples, pieces[::2])), dict(zip(examples, pieces[1::2]))


def load(data_dir: pathlib.Path | None, limit: int | None) -> tuple[Examples, Examples]:
    """Returns the examples to learn from, and the held-out ones to test with."""
    if data_dir is None:
        digits = load_digits()
        return cut(examples_of(digits.images[:limit], digits.target[:limit]), 0.2)
    found = {part: sorted(data_dir.glob(f"{part}-*-idx?-ubyte*")) for part in ("train", "t10k")}
    # The names sort the images before the labels.
    read = {part: examples_of(*(tk.data.read_idx(file)[:limit] for file in files)) for part, files in found.items() if files}
    if "t10k" not in read:
        raise SystemExit(f"no t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, plain or .gz, in {data_dir}")
    return (read["train"], read["t10k"]) if "train" in read else cut(read["t10k"], 0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=pathlib.Path, help="folder of MNIST's IDX files, plain or .gz")
    parser.add_argument("--logdir", type=pathlib.Path, default="runs/digits", help="folder of the runs")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="use that many examples only")
    args = parser.parse_args()

    train, test = load(args.data_dir, args.limit)
    train, valid = cut(train, 0.1)
    data = tk.data.Arrays(train, args.batch_size, shuffle=True, seed=args.seed)
    steps = args.epochs * len(data)
    schedule = optax.warmup_cosine_decay_schedule(0.0, args.learning_rate, steps // 10, steps)
    hparams = {name: getattr(args, name) for name in ("epochs", "batch_size", "learning_rate", "seed")}

    trainer = DigitsTrainer(
        CNN(),
        optax.adam(schedule),
        seed=args.seed,
        logdir=args.logdir / time.strftime("%Y%m%d-%H%M%S"),
        callbacks=[
            tk.callbacks.Lambda(on_fit_start=lambda info: info.writer.write_hparams(hparams)),
            tk.callbacks.EMA(0.99),
            tk.callbacks.EarlyStopping("eval/loss", patience=10, restore_best=True),
            tk.callbacks.LearningRate(schedule=schedule, every=tk.Every(epochs=1)),
            tk.callbacks.LogMetrics(every=tk.Every(epochs=1)),
            tk.callbacks.Progress(),
            Pictures(test),
        ],
    )
    result = trainer.fit(data, epochs=args.epochs, eval_data=tk.data.Arrays(valid, 256))
    scores = trainer.evaluate(tk.data.Arrays(test, 256))

    print(f"{result.step} steps in {result.seconds:.1f} s, {result.stopped_by or 'no early stop'}")
    print("test " + " ".join(f"{name} {value:.4f}" for name, value in scores.items()))
    print(f"tensorboard --logdir {args.logdir}")


if __name__ == "__main__":
    main()
