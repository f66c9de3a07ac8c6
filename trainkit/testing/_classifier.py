"""A small classifier and its data, which the proofs train. Owns no proof."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from trainkit._core.context import StepContext
from trainkit._core.typing import Batch, Outputs
from trainkit._trainer.trainer import Trainer

FEATURES, CLASSES = 5, 3


class Net(nn.Module):
    """An MLP that takes a batch or one example."""

    norm: bool
    axis_name: str | None = "batch"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Dense(8)(x)
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=self.axis_name)(x)
        return nn.Dense(CLASSES)(nn.relu(x))


class NetTrainer(Trainer):
    def loss(self, model: Any, batch: Batch, ctx: StepContext) -> tuple[jax.Array, Outputs]:
        logits = model(batch["x"], train=ctx.train)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        # What pads may hold anything, and must do no harm.
        return jnp.where(ctx.mask, losses, jnp.nan), {"logits": logits, "labels": batch["y"]}


def examples(rows: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, rows).astype(np.int32)
    return {"x": (rng.normal(size=(rows, FEATURES)) + y[:, None]).astype(np.float32), "y": y}
