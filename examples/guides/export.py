"""Export: a trained model in one file that runs without its Python code, for any batch size.

python examples/guides/export.py
"""

import pathlib
import tempfile

import jax
import numpy as np
import optax
from flax import linen as nn

import trainkit as tk


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = nn.relu(nn.Dense(8)(x))
        return nn.Dense(1)(nn.Dropout(0.1, deterministic=not train)(x))


class Regression(tk.Trainer):
    def loss(self, model, batch, ctx):
        return optax.l2_loss(model(batch["x"], train=ctx.train), batch["y"]).mean(axis=-1), {}

    def predict_step(self, model, batch, ctx):
        return model(batch["x"], train=False)


def samples(rows: int = 32, seed: int = 0):
    x = np.random.default_rng(seed).normal(size=(rows, 4)).astype(np.float32)
    return {"x": x, "y": np.sin(x.sum(axis=1, keepdims=True))}


# start: main
def main():
    data, path = samples(), pathlib.Path(tempfile.mkdtemp()) / "regression.tk"
    trainer = Regression(Net(), optax.adam(1e-2), callbacks=[tk.callbacks.EMA(0.9)])
    trainer.fit([data], steps=50)

    # predict_step with the averaged weights; only the shapes of the example count.
    tk.export.save(path, trainer, {"x": data["x"]})
    exported = tk.export.load(path)
    print(exported)
    predictions = {rows: exported({"x": samples(rows)["x"]}) for rows in (1, 3, 32)}
    print({rows: array.shape for rows, array in predictions.items()})
    return trainer, predictions


# end: main

if __name__ == "__main__":
    main()
