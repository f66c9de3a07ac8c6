"""`SWA` on eight devices: the mean, and its batch statistics over all rows, against NumPy."""

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn

import trainkit as tk


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=not train, axis_name="batch")(x)
        return nn.Dense(1)(nn.relu(x))[..., 0]


class Unsynced(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        return nn.Dense(1)(nn.relu(x))[..., 0]


class Squares(tk.Trainer):
    def loss(self, model, batch, ctx):
        return (model(batch["x"], ctx.train) - batch["y"]) ** 2, {}


def batches(*sizes):
    rng = np.random.default_rng(0)
    return [
        {"x": rng.normal(1, 2, (n, 3)).astype(np.float32), "y": rng.normal(size=n).astype(np.float32)}
        for n in sizes
    ]


@pytest.mark.parametrize(
    ("strategy", "model", "sizes"),
    [
        (tk.parallel.Mesh(), Net, (16, 8, 13)),
        (tk.parallel.Mesh(fsdp=4), Unsynced, (16, 8, 5)),
        (tk.parallel.PerExample(), Net, (16, 8)),
        (tk.parallel.Pmap(), Net, (16, 8)),
        (tk.parallel.Pmap(), Unsynced, (16, 8)),
    ],
)
def test_the_mean_and_its_statistics(strategy, model, sizes):
    seen, data = [], batches(*sizes)
    keep = tk.callbacks.Lambda(on_step=lambda info: seen.append(jax.device_get(info.state.params)))
    callbacks = [tk.callbacks.SWA(2, 2, refresh=data), keep]
    made = Squares(model(), optax.adam(0.02), callbacks=callbacks, strategy=strategy)
    train = batches(16, 16)
    state = made.fit(train, steps=5, eval_data=train, eval_every=tk.Every(steps=2)).state
    shown = jax.device_get(tk.callbacks.SWA.view(state))
    expected = jax.tree.map(lambda *leaves: np.mean(leaves, 0), seen[1], seen[3])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), shown.params, expected)
    layer = shown.params["Dense_0"]
    rows = np.concatenate([batch["x"] for batch in data]) @ layer["kernel"] + layer["bias"]
    np.testing.assert_allclose(shown.batch_stats["BatchNorm_0"]["mean"], rows.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(shown.batch_stats["BatchNorm_0"]["var"], rows.var(0), rtol=1e-4, atol=1e-5)
    assert made.evaluate(train)["loss"] != made.evaluate(train, weights="live")["loss"]
