"""Batch statistics under vmap: the loss is written for ONE example, and the layer reduces over the named batch.

python examples/guides/batch_norm_vmap.py
"""

import functools

import jax
import numpy as np
import optax
from flax import linen as nn

import trainkit as tk


# start: model
class MLP(nn.Module):
    """Two hidden layers with batch statistics over the axis `axis_name`."""

    hidden: int = 16
    out: int = 1
    axis_name: str | None = "batch"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, axis_name=self.axis_name
        )
        for _ in range(2):
            x = nn.relu(norm()(nn.Dense(self.hidden)(x)))
        return nn.Dense(self.out)(x)


class OneExample(tk.Trainer):
    """The loss of one example: `x` [3] and `y` [1], without a batch dimension."""

    def loss(self, model, batch, ctx):
        prediction = model(batch["x"], train=ctx.train)
        return ((prediction - batch["y"]) ** 2).mean(), {}


# end: model


def samples(rows: int = 32, seed: int = 0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 3)).astype(np.float32)
    return {"x": x, "y": np.sin(x.sum(axis=1, keepdims=True))}


# start: main
def main():
    data, unseen = samples(), samples(seed=1)
    trainer = OneExample(MLP(), optax.sgd(0.05, momentum=0.9), strategy="vmap")
    state = trainer.fit([data], steps=100).state
    # The statistics have no batch dimension; evaluation uses them in place of those of the batch.
    print("mean", jax.tree.map(np.shape, state.batch_stats["BatchNorm_0"]))
    losses = {"train": trainer.evaluate([data])["loss"], "unseen": trainer.evaluate([unseen])["loss"]}
    print(losses)
    return losses


# end: main

if __name__ == "__main__":
    main()
