"""Linear regression: the loss is written for one pair, and trainkit maps it over the samples.

python examples/guides/linear_regression.py
"""

import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import trainkit as tk


# start: trainer
class LinearRegression(tk.Trainer):
    """Half the squared error of one pair `x` [10], `y` [5]."""

    def loss(self, model, batch, ctx):
        error = batch["y"] - model(batch["x"])
        return 0.5 * jnp.inner(error, error), {}


# end: trainer


def samples(count: int = 20, seed: int = 0):
    """Returns noisy samples of `y = W x + b`, and the `W` and `b` they were drawn from as Dense keeps them."""
    rng = np.random.default_rng(seed)
    truth = {"kernel": rng.normal(size=(10, 5)), "bias": rng.normal(size=5)}
    x = rng.normal(size=(count, 10))
    y = x @ truth["kernel"] + truth["bias"] + 0.1 * rng.normal(size=(count, 5))
    as_float32 = {name: array.astype(np.float32) for name, array in {"x": x, "y": y, **truth}.items()}
    return {name: as_float32[name] for name in ("x", "y")}, {name: as_float32[name] for name in truth}


# start: main
def main():
    data, truth = samples()
    losses = {}
    for name, tx in {"SGD": optax.sgd(0.3), "Adam": optax.adam(0.3)}.items():
        trainer = LinearRegression(nn.Dense(5), tx, strategy="vmap")
        # One batch that holds every sample is full-batch gradient descent.
        trainer.fit([data], steps=101)
        losses[name] = trainer.evaluate([data])["loss"]
        trainer.state = trainer.state.replace(params=truth)
        losses["truth"] = trainer.evaluate([data])["loss"]
    print(", ".join(f"loss of {name} {value:.6f}" for name, value in losses.items()))
    return losses


# end: main

if __name__ == "__main__":
    main()
