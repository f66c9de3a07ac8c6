"""Optax in trainkit: schedules, chains, clipping, masks, frozen parts, injected hyperparameters, MultiSteps.

python examples/guides/optimizers.py
"""

import jax
import numpy as np
import optax
from flax import linen as nn

import trainkit as tk


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(16, name="body")(x))
        return nn.Dense(1, name="head")(x)


class Regression(tk.Trainer):
    def loss(self, model, batch, ctx):
        return optax.l2_loss(model(batch["x"]), batch["y"]).mean(axis=-1), {}


def samples(rows: int = 64, seed: int = 0):
    x = np.random.default_rng(seed).normal(size=(rows, 4)).astype(np.float32)
    return {"x": x, "y": np.sin(x.sum(axis=1, keepdims=True))}


# start: recipes
SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 1e-2, warmup_steps=8, decay_steps=40)


def kernels(params):
    """Returns True for the matrices and False for the biases."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def by_part(params):
    """Returns the name of the optimizer of each leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key, params)


def recipes() -> dict[str, optax.GradientTransformation]:
    return {
        "schedule": optax.adam(SCHEDULE),
        "chain": optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.scale_by_adam(),
            optax.add_decayed_weights(1e-3, mask=kernels),
            optax.scale_by_learning_rate(SCHEDULE),
        ),
        "clipped": optax.chain(optax.clip(0.1), optax.sgd(0.1, momentum=0.9)),
        "masked": optax.adamw(1e-2, weight_decay=0.1, mask=kernels),
        "frozen body": optax.multi_transform(
            {"head": optax.adam(1e-2), "body": optax.set_to_zero()}, by_part
        ),
        "injected": optax.inject_hyperparams(optax.adam)(learning_rate=SCHEDULE),
        "every second": optax.MultiSteps(optax.adam(1e-2), every_k_schedule=2).gradient_transformation(),
    }


# end: recipes


# start: rate
def logs_rate(name: str) -> list[tk.callbacks.Callback]:
    """Returns what writes the learning rate of a recipe to the log, where it has one that changes."""
    if name == "injected":  # It lies in the optimizer state, and is read there.
        return [tk.callbacks.LearningRate(every=tk.Every(steps=10))]
    if name in ("schedule", "chain"):  # Optax keeps only a count of the updates: pass the schedule.
        return [tk.callbacks.LearningRate(every=tk.Every(steps=10), schedule=SCHEDULE)]
    return []


# end: rate


# start: main
def main():
    data, histories = tk.data.Arrays(samples(), batch_size=16), {}
    for name, tx in recipes().items():
        result = Regression(MLP(), tx, callbacks=logs_rate(name)).fit(data, steps=40)
        histories[name] = result.history
        rates = [f"{rate:.2g}" for _, rate in dict(result.history).get("learning_rate", [])]
        print(f"{name:<13} loss {result.history.last('train/loss'):.4f}", *rates)
    return histories


# end: main

if __name__ == "__main__":
    main()
