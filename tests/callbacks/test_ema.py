"""`EMA` against the recursion in NumPy; what it does to evaluations is in `tests/trainer/test_training.py`."""

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn

import trainkit as tk
from tests.helpers.compare import assert_same
from trainkit.callbacks import EMA, Lambda

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
DATA = [{"x": X, "y": X.sum(1)}]


class Line(tk.Trainer):
    def loss(self, model, batch, ctx):
        return (model(batch["x"])[:, 0] - batch["y"]) ** 2, {}


def _params(model):
    return model.variables["params"]


def test_several_by_name_each_with_its_half_life():
    seen = []
    keep = Lambda(on_step=lambda info: seen.append(jax.device_get(info.state.params)))
    averages = [EMA(half_life=2), EMA(half_life=5, name="slow"), EMA(0.5, debias=True, name="fast")]
    made = Line(nn.Dense(1), optax.sgd(0.1), callbacks=[*averages, keep])
    start = jax.device_get(made.init(DATA[0]).params)
    state = made.fit(DATA, steps=7).state

    def average(decay, start):
        for params in seen:
            start = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p.astype(np.float64), start, params)
        return start

    fast = jax.tree.map(lambda leaf: leaf / (1 - 0.5**7), average(0.5, jax.tree.map(np.zeros_like, start)))
    slow = average(0.5 ** (1 / 5), start)
    for weights, expected in {
        "averaged": average(0.5 ** (1 / 2), start),
        "ema": average(0.5 ** (1 / 2), start),
        "slow": slow,
        "fast": fast,
        "live": seen[-1],
    }.items():
        got = jax.device_get(made.apply(_params, weights=weights))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)
    assert_same(made.apply(_params, weights="slow"), EMA.view(state, "slow").params)
    with pytest.raises(ValueError, match=r"no average named 'other'"):
        EMA.view(state, "other")
