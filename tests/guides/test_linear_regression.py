"""Gradient descent on a linear model, against the loop written by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from tests.helpers.guides import keys, load, recorded

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


@pytest.fixture(scope="module")
def ran():
    return recorded(guide.main)


@pytest.mark.parametrize("index", [0, 1], ids=["sgd", "adam"])
def test_every_step_is_that_of_the_loop_by_hand(index, ran, check):
    tx = (optax.sgd, optax.adam)[index](0.3)
    check(ran[2][index], list(by_hand(tx, guide.samples()[0], 101)))


def test_sgd_is_the_subtraction_of_scaled_gradients(ran):
    (data, _), steps = guide.samples(), ran[2][0].trees
    x, y = data["x"].astype(np.float64), data["y"].astype(np.float64)
    for (before, _, _), (after, _, _) in itertools.pairwise(steps[:6]):
        error = x @ before["kernel"] + before["bias"] - y
        slopes = {"kernel": x.T @ error / len(x), "bias": error.mean(axis=0)}
        for name, slope in slopes.items():
            np.testing.assert_allclose(after[name], before[name] - 0.3 * slope, rtol=1e-5, atol=1e-6)


def test_the_learned_parameters_fit_the_samples_better_than_the_true_ones(ran):
    data, truth = guide.samples()
    losses = ran[0]
    error = data["x"].astype(np.float64) @ truth["kernel"] + truth["bias"] - data["y"]
    assert losses["truth"] == pytest.approx(0.5 * (error**2).sum(axis=1).mean(), rel=1e-5)
    assert losses["SGD"] < losses["truth"]
    assert losses["Adam"] < losses["truth"]
