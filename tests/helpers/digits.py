"""A small classification problem, a model with state and noise, and its trainer: what many tests train."""

import flax
import numpy as np
import optax
from clu import metrics
from flax import linen as nn

import trainkit as tk

ROWS, FEATURES, CLASSES = 96, 8, 4


class Net(nn.Module):
    """An MLP with batch statistics and dropout, both optional."""

    norm: bool = True
    rate: float = 0.3
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(16)(x)
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=self.axis_name)(x)
        x = nn.relu(x)
        x = nn.Dropout(self.rate, deterministic=not train)(x)
        return nn.Dense(CLASSES)(x)


@flax.struct.dataclass
class Metrics(metrics.Collection):
    loss: metrics.Average.from_output("loss")
    accuracy: metrics.Accuracy


class NetTrainer(tk.Trainer):
    metrics = Metrics

    def loss(self, model, batch, ctx):
        logits = model(batch["x"], train=ctx.train)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return losses, {"logits": logits, "labels": batch["y"]}


def arrays(rows=ROWS, seed=0):
    """Returns separable data: float32[rows, FEATURES] and int32[rows]."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, rows).astype(np.int32)
    centres = np.random.default_rng(7).normal(size=(CLASSES, FEATURES))
    x = centres[y] + 0.5 * rng.normal(size=(rows, FEATURES))
    return {"x": x.astype(np.float32), "y": y}


def batches(count, rows=16, seed=0):
    """Returns a list of `count` batches of `rows`."""
    return [arrays(rows, seed=1000 * seed + index) for index in range(count)]
