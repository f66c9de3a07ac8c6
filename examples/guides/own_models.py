"""Models of your own: setup and compact, a custom parameter, several methods, a module from elsewhere inside.

python examples/guides/own_models.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

import trainkit as tk


# start: setup and compact
class WithSetup(nn.Module):
    """Submodules are attributes, named after them."""

    def setup(self) -> None:
        self.hidden = nn.Dense(8)
        self.out = nn.Dense(1)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(nn.relu(self.hidden(x)))


class Compact(nn.Module):
    """The same model with its submodules inline: equal names give equal parameters."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(8, name="hidden")(x))
        return nn.Dense(1, name="out")(x)


# end: setup and compact


# start: parameter
def near_one(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return 1 + 0.1 * jax.random.normal(key, shape)


class Scaled(nn.Module):
    """A dense layer whose inputs are scaled by a learned parameter with an initialiser of its own."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", near_one, x.shape[-1:])
        return nn.Dense(1)(x * scale[None])


# end: parameter


# start: foreign
class WithForeign(nn.Module):
    """A module of another system inside: here one of Flax NNX, made a linen module by Flax's bridge."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nnx.bridge.to_linen(nnx.Linear, 4, 8, name="foreign")(x))
        return nn.Dense(1)(x)


# end: foreign


class Regression(tk.Trainer):
    def loss(self, model, batch, ctx):
        return optax.l2_loss(model(batch["x"]), batch["y"]).mean(axis=-1), {}


# start: autoencoder
class Autoencoder(nn.Module):
    """Two methods, and no `__call__`."""

    def setup(self) -> None:
        self.encoder = nn.Dense(2)
        self.decoder = nn.Dense(4)

    def encode(self, x: jax.Array) -> jax.Array:
        return self.encoder(x)

    def decode(self, code: jax.Array) -> jax.Array:
        return self.decoder(code)


class Reconstruction(tk.Trainer):
    """The loss calls both methods; a prediction is the code."""

    def loss(self, model, batch, ctx):
        code = model.encode(batch["x"])
        losses = ((model.decode(code) - batch["x"]) ** 2).mean(axis=-1)
        return losses + 1e-3 * jnp.abs(code).mean(axis=-1), {}

    def predict_step(self, model, batch, ctx):
        return model.encode(batch["x"])


# end: autoencoder


def samples(rows: int = 32, seed: int = 0):
    x = np.random.default_rng(seed).normal(size=(rows, 4)).astype(np.float32)
    return {"x": x, "y": np.sin(x.sum(axis=1, keepdims=True))}


# start: main
def main():
    data, losses = samples(), {}
    for model in (WithSetup(), Compact(), Scaled(), WithForeign()):
        trainer = Regression(model, optax.adam(1e-2))
        trainer.fit([data], steps=50)
        losses[type(model).__name__] = trainer.evaluate([data])["loss"]
    trainer = Reconstruction(Autoencoder(), optax.adam(1e-2))
    trainer.fit([data], steps=50)
    losses["Autoencoder"] = trainer.evaluate([data])["loss"]
    codes = trainer.predict([{"x": data["x"]}])
    print(", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    print("codes", codes.shape)
    return losses


# end: main

if __name__ == "__main__":
    main()
