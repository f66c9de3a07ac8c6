"""Variables by hand: read them, replace them, freeze parts of them, and go on with other data.

python examples/guides/variables_by_hand.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import trainkit as tk


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = nn.Dense(8, name="body")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x))
        return nn.Dense(1, name="head")(x)


class Regression(tk.Trainer):
    def loss(self, model, batch, ctx):
        return optax.l2_loss(model(batch["x"], train=ctx.train), batch["y"]).mean(axis=-1), {}


# start: between fits
def with_new_head(state: tk.TrainState) -> tk.TrainState:
    """Returns the state with the head set to zero, and a fresh optimizer state for it."""
    head = jax.tree.map(jnp.zeros_like, state.params["head"])
    params = {**state.params, "head": head}
    return state.replace(params=params, opt_state=state.tx.init(params))


def with_fresh_statistics(state: tk.TrainState) -> tk.TrainState:
    """Returns the state with means of 0 and variances of 1."""
    norm = state.batch_stats["norm"]
    fresh = {"mean": jnp.zeros_like(norm["mean"]), "var": jnp.ones_like(norm["var"])}
    return state.replace_model_state({"batch_stats": {"norm": fresh}})


# end: between fits


# start: freezing
def training_only(state: tk.TrainState, tx: optax.GradientTransformation, *parts: str) -> tk.TrainState:
    """Returns the state with an optimizer that moves only the named parts of the parameters."""
    labels = {name: "free" if name in parts else "frozen" for name in state.params}
    tx = optax.multi_transform({"free": tx, "frozen": optax.set_to_zero()}, labels)
    return state.replace(tx=tx, opt_state=tx.init(state.params))


def training_all(state: tk.TrainState, tx: optax.GradientTransformation) -> tk.TrainState:
    return state.replace(tx=tx, opt_state=tx.init(state.params))


# end: freezing


def samples(rows: int = 32, seed: int = 0):
    x = np.random.default_rng(seed).normal(size=(rows, 4)).astype(np.float32)
    return {"x": x, "y": np.sin(x.sum(axis=1, keepdims=True))}


# start: main
def main():
    old, new = samples(), samples(seed=1)
    # Between two steps of one fit a callback returns what is to become of the state.
    refresh = tk.callbacks.Lambda(
        every=tk.At(steps=(10,)), on_step=lambda info: tk.Update(with_fresh_statistics)
    )
    trainer = Regression(Net(), optax.adam(1e-2), callbacks=[refresh])
    trainer.fit([old], steps=20)
    print("mean of the input of the norm", np.round(trainer.state.batch_stats["norm"]["mean"][:3], 3))

    # Between two fits you set the state: a new head, and everything else frozen.
    trainer.state = training_only(with_new_head(trainer.state), optax.adam(1e-2), "head")
    trainer.fit([new], steps=10)

    # Everything again, with other data and a smaller learning rate; the count of the steps goes on.
    trainer.state = training_all(trainer.state, optax.adam(1e-3))
    result = trainer.fit([new], steps=10)
    print("step", result.step, "loss", trainer.evaluate([new])["loss"])
    return result.state


# end: main

if __name__ == "__main__":
    main()
