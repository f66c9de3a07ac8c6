"""Gradient descent on a linear model, against the loop written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from tests.guides._guides import Record, keys, load

guide = load("linear_regression")


def by_hand(tx, data, steps):
    model = nn.Dense(5)
    params = jax.jit(model.init)(keys()[0], data["x"][0])["params"]
    opt_state = tx.init(params)

    def loss(params, xs, ys):
        def half_squared_error(x, y):
            error = y - model.apply({"params": params}, x)
            return 0.5 * jnp.inner(error, error)

        return jax.vmap(half_squared_error)(xs, ys).mean()

    @jax.jit
    def step(params, opt_state, xs, ys):
        value, grads = jax.value_and_grad(loss)(params, xs, ys)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    for _ in range(steps):
        params, opt_state, value = step(params, opt_state, data["x"], data["y"])
        yield params, opt_state, {}, value


@pytest.mark.parametrize("make", [optax.sgd, optax.adam])
def test_every_step_is_that_of_the_loop_by_hand(make, check):
    (data, _), tx, record = guide.samples(), make(0.3), Record()
    trainer = guide.LinearRegression(nn.Dense(5), tx, strategy="vmap", callbacks=[record])
    trainer.fit([data], steps=101)
    check(record, list(by_hand(tx, data, 101)))


def test_sgd_is_the_subtraction_of_scaled_gradients():
    (data, _), record = guide.samples(), Record()
    trainer = guide.LinearRegression(nn.Dense(5), optax.sgd(0.3), strategy="vmap", callbacks=[record])
    params = jax.device_get(trainer.init(data).params)
    trainer.fit([data], steps=5)
    x, y = data["x"].astype(np.float64), data["y"].astype(np.float64)
    for got, _, _ in record.trees:
        error = x @ params["kernel"] + params["bias"] - y
        slopes = {"kernel": x.T @ error / len(x), "bias": error.mean(axis=0)}
        params = {name: value - 0.3 * slopes[name] for name, value in params.items()}
        for name, value in params.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-6)


def test_the_learned_parameters_fit_the_samples_better_than_the_true_ones():
    data, truth = guide.samples()
    losses = guide.main()
    error = data["x"].astype(np.float64) @ truth["kernel"] + truth["bias"] - data["y"]
    assert losses["truth"] == pytest.approx(0.5 * (error**2).sum(axis=1).mean(), rel=1e-5)
    assert losses["SGD"] < losses["truth"]
    assert losses["Adam"] < losses["truth"]
