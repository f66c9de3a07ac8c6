"""Checkpoints of weights alone, restored onto other layouts than they were saved from."""

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn

import trainkit as tk


class Wide(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, axis_name="batch")(nn.Dense(16)(x))
        return nn.Dense(1)(nn.relu(x))[..., 0]


class Squares(tk.Trainer):
    def loss(self, model, batch, ctx):
        return (model(batch["x"], ctx.train) - batch["y"]) ** 2, {}


X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
DATA = [{"x": X, "y": X.sum(1)}]


def made(strategy, *callbacks, **options):
    ema = tk.callbacks.EMA(0.5)
    return Squares(Wide(), optax.adam(0.05), callbacks=[ema, *callbacks], strategy=strategy, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    logdir = tmp_path_factory.mktemp("run")
    keeper = tk.callbacks.Checkpoint(tk.Never(), weights_only=True)
    trainer = made(tk.parallel.Mesh(fsdp=8), keeper, logdir=logdir)
    state = trainer.fit(DATA, steps=4).state
    return logdir, jax.device_get(tk.callbacks.EMA.view(state).params), trainer.evaluate(DATA)


@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize(
    "strategy", [tk.parallel.Mesh(fsdp=4), tk.parallel.Mesh(devices=jax.devices()[:1]), tk.parallel.Pmap()]
)
def test_restored(run, strategy, started):
    logdir, expected, scores = run
    trainer = made(strategy)
    if started:
        trainer.init(DATA[0])
    trainer.restore(logdir)
    shown = jax.device_get(tk.callbacks.EMA.view(trainer.state).params)
    jax.tree.map(np.testing.assert_array_equal, shown, expected)
    np.testing.assert_allclose(trainer.evaluate(DATA)["loss"], scores["loss"], rtol=1e-5)
    assert trainer.fit(DATA, steps=1).step == 5
