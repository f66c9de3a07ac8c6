"""Serialization: bytes and state dicts in Flax's way, and whole files that tell when they do not fit.

python examples/guides/serialization.py
"""

import pathlib
import tempfile
from typing import Any

import flax.serialization
import jax
import numpy as np
import optax
from flax import linen as nn

import trainkit as tk


class Net(nn.Module):
    features: int = 8

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = nn.Dense(self.features)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(1)(x)


class Regression(tk.Trainer):
    def loss(self, model, batch, ctx):
        return optax.l2_loss(model(batch["x"], train=ctx.train), batch["y"]).mean(axis=-1), {}


def samples(rows: int = 32, seed: int = 0):
    x = np.random.default_rng(seed).normal(size=(rows, 4)).astype(np.float32)
    return {"x": x, "y": np.sin(x.sum(axis=1, keepdims=True))}


# start: bytes
def through_bytes(state: tk.TrainState, template: tk.TrainState) -> Any:
    """Returns what `flax.serialization` makes of the whole state, its typed key included."""
    return flax.serialization.from_bytes(template, flax.serialization.to_bytes(state))


# end: bytes


# start: main
def main():
    data, folder = samples(), pathlib.Path(tempfile.mkdtemp())
    trainer = Regression(Net(), optax.adam(1e-2))
    state = trainer.fit([data], steps=10).state

    # The parameters alone, for other programs, and the whole state, to go on from.
    tk.save(folder / "params.safetensors", state.params)
    tk.save(folder / "state.msgpack", state)

    other = Regression(Net(), optax.adam(1e-2), seed=1)
    other.state = tk.load(folder / "state.msgpack", like=other.init(data))
    by_bytes = Regression(Net(), optax.adam(1e-2), seed=1)
    by_bytes.state = through_bytes(state, by_bytes.init(data))
    results = [each.fit([data], steps=10).state for each in (trainer, other, by_bytes)]
    print("steps", *(int(result.step) for result in results))

    try:
        tk.load(folder / "params.safetensors", like=Regression(Net(6), optax.adam(1e-2)).init(data).params)
    except ValueError as error:
        print(error)
    return results


# end: main

if __name__ == "__main__":
    main()
