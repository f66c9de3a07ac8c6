"""Batch statistics of a loss written for one example, against the vmapped and the batched loop by hand."""

import functools

import jax
import numpy as np
import optax
import pytest

from tests.helpers.guides import keys, load, recorded

guide = load("batch_norm_vmap")
STEPS, TX = 100, optax.sgd(0.05, momentum=0.9)


def one_by_one(model, tx, data):
    variables = jax.jit(functools.partial(model.init, train=True))(keys()[0], data["x"][0])
    params, state = variables["params"], {"batch_stats": variables["batch_stats"]}
    opt_state = tx.init(params)

    def loss(params, state, batch):
        def of_one(x, y):
            prediction, updated = model.apply({"params": params, **state}, x, train=True, mutable=list(state))
            return ((prediction - y) ** 2).mean(), updated

        mapped = jax.vmap(of_one, out_axes=(0, None), axis_name="batch")
        losses, updated = mapped(batch["x"], batch["y"])
        return losses.mean(), updated

    yield from steps(loss, params, opt_state, state, tx, data)


def all_at_once(model, tx, data):
    variables = jax.jit(functools.partial(model.init, train=True))(keys()[0], data["x"])
    params, state = variables["params"], {"batch_stats": variables["batch_stats"]}
    opt_state = tx.init(params)

    def loss(params, state, batch):
        prediction, updated = model.apply(
            {"params": params, **state}, batch["x"], train=True, mutable=list(state)
        )
        return ((prediction - batch["y"]) ** 2).mean(axis=-1).mean(), updated

    yield from steps(loss, params, opt_state, state, tx, data)


def steps(loss, params, opt_state, state, tx, data):
    @jax.jit
    def step(params, opt_state, state, batch):
        (value, updated), grads = jax.value_and_grad(loss, has_aux=True)(params, state, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, updated, value

    for _ in range(STEPS):
        params, opt_state, state, value = step(params, opt_state, state, data)
        yield params, opt_state, state, value


@pytest.fixture(scope="module")
def ran():
    return recorded(guide.main)


def test_every_step_is_that_of_the_loop_by_hand(ran, check):
    check(ran[2][0], list(one_by_one(guide.MLP(), TX, guide.samples())))


def test_it_is_the_batched_model_under_jit(ran, check):
    # Sums over the batch run in another order, and the difference grows with the steps.
    check(ran[2][0], list(all_at_once(guide.MLP(axis_name=None), TX, guide.samples())), atol=1e-4, rtol=1e-3)


def test_evaluation_uses_the_running_averages(ran):
    losses, (trainer,), _ = ran
    data = guide.samples(seed=1)
    errors = np.asarray(guide.MLP().apply(trainer.state.variables, data["x"], train=False)) - data["y"]
    assert losses["unseen"] == pytest.approx(float((errors**2).mean()), rel=1e-5)
    # Alone in its batch an example is judged as among others.
    one = trainer.evaluate([{name: value[:1] for name, value in data.items()}])
    assert one["loss"] == pytest.approx(float((errors[0] ** 2).mean()), rel=1e-5)


def test_a_model_without_the_axis_name_is_told_the_variable_and_the_cure():
    trainer = guide.OneExample(guide.MLP(axis_name=None), TX, strategy="vmap")
    with pytest.raises(ValueError, match=r"batch_stats/BatchNorm_0/mean.*BatchNorm_1/var.*axis_name='batch'"):
        trainer.fit([guide.samples()], steps=1)
