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
    """Half the squared error of one pair, `x` [10] and `y` [5]."""

    def loss(self, model, batch, ctx):
        error = batch["y"] - model(batch["x"])
        return 0.5 * jnp.inner(error, error), {}


# end: trainer


def samples(count: int = 20, seed: int = 0):
    """Returns noisy samples of `y = x W + b`, and `W` and `b` under the names that `nn.Dense` gives them."""
    rng = np.random.default_rng(seed)
    truth = {"kernel": rng.normal(size=(10, 5)), "bias": rng.normal(size=5)}
    x = rng.normal(size=(count, 10))
    data = {"x": x, "y": x @ truth["kernel"] + truth["bias"] + 0.1 * rng.normal(size=(count, 5))}
    single = [{name: array.astype(np.float32) for name, array in tree.items()} for tree in (data, truth)]
    return single[0], single[1]


# start: main
def main():
    data, truth = samples()
    losses = {}
    for name, tx in {"SGD": optax.sgd(0.3), "Adam": optax.adam(0.3)}.items():
        log = tk.callbacks.LogMetrics(every=tk.Every(steps=20))
        trainer = LinearRegression(nn.Dense(5), tx, strategy="vmap", callbacks=[log])
        # A batch that holds all samples makes it full-batch gradient descent.
        result = trainer.fit([data], steps=101)
        losses[name] = trainer.evaluate([data])["loss"]
        print(name, *(f"{step}: {loss:.4f}" for step, loss in result.history["train/loss"]))

    # The samples are noisy, so the parameters that fit them best are not the true ones.
    ideal = LinearRegression(nn.Dense(5), optax.sgd(0.3), strategy="vmap")
    ideal.state = ideal.init(data).replace(params=truth)
    losses["truth"] = ideal.evaluate([data])["loss"]
    print(", ".join(f"{name} {loss:.6f}" for name, loss in losses.items()))
    return losses


# end: main

if __name__ == "__main__":
    main()
