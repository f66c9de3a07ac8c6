"""Parameters and state: trainkit takes the variables of a model apart and puts them together again.

python examples/guides/params_and_state.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import trainkit as tk


# start: model
class BiasAdderWithRunningMean(nn.Module):
    """Subtracts the running mean of its input, and adds a bias that is learned."""

    momentum: float = 0.9

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        initialized = self.has_variable("batch_stats", "mean")
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[1:])
        if initialized and self.is_mutable_collection("batch_stats"):
            mean.value = self.momentum * mean.value + (1 - self.momentum) * x.mean(axis=0, keepdims=True)
        return x - mean.value + bias


class SumOfSquares(tk.Trainer):
    def loss(self, model, batch, ctx):
        return ((model(batch["x"]) - batch["y"]) ** 2).sum(), {}


# end: model


# start: collections
random_rotation = nn.initializers.orthogonal()


class Tracked(nn.Module):
    """A layer with parameters and three other collections, one of them named by you."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        seen = self.variable("counters", "examples", jnp.zeros, (), jnp.int32)
        largest = self.variable("ranges", "largest", jnp.zeros, ())
        # No optimizer sees it: only `params` are trained.
        mix = self.variable("constants", "mix", lambda: random_rotation(self.make_rng("params"), (4, 4)))
        if not self.is_initializing() and self.is_mutable_collection("counters"):
            seen.value += len(x)
            largest.value = jnp.maximum(largest.value, jnp.abs(x).max())
        return nn.Dense(4)(x @ mix.value)


# end: collections


def samples(rows: int = 10, features: int = 4, seed: int = 0):
    x = np.random.default_rng(seed).normal(1.0, 1.0, (rows, features)).astype(np.float32)
    return {"x": x, "y": np.ones_like(x)}


# start: main
def main():
    data = samples()
    trainer = SumOfSquares(BiasAdderWithRunningMean(), optax.sgd(0.02))
    before = trainer.init(data)
    state = trainer.fit([data], steps=100).state
    print("mean", before.batch_stats["mean"].shape, "->", state.batch_stats["mean"].shape)
    print("loss", trainer.evaluate([data])["loss"])

    tracked = SumOfSquares(Tracked(), optax.adam(0.02))
    trained = tracked.fit([data], steps=100).state
    print("collections", ", ".join(trained.model_state), "and", *trained.params)
    print("examples seen", int(trained.collections["counters"]["examples"]))
    return state, trained


# end: main

if __name__ == "__main__":
    main()
