"""Models of several makes, against the loop by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers.compare import assert_same
from tests.helpers.guides import keys, load, recorded

guide = load("own_models")
STEPS = 50


def by_hand(init, loss, data):
    """Adam on `loss(params, batch)` from the parameters that `init(key)` makes."""
    tx = optax.adam(1e-2)
    params = jax.jit(init)(keys()[0])["params"]
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    for _ in range(STEPS):
        params, opt_state, value = step(params, opt_state, data)
        yield params, opt_state, {}, value


@pytest.fixture(scope="module")
def ran():
    """The trainer and the record of each model."""
    losses, trainers, records = recorded(guide.main)
    return dict(zip(losses, zip(trainers, records, strict=True), strict=True))


@pytest.mark.parametrize("name", ["WithSetup", "Compact", "Scaled", "WithForeign"])
def test_every_step_is_that_of_the_loop_by_hand(name, ran, check):
    data, model = guide.samples(), getattr(guide, name)()

    def loss(params, batch):
        y = model.apply({"params": params}, batch["x"])
        return optax.l2_loss(y, batch["y"]).mean(axis=-1).mean()

    check(ran[name][1], list(by_hand(lambda key: model.init(key, data["x"]), loss, data)))


def test_several_methods_are_those_of_the_loop_by_hand(ran, check):
    data, model, (trainer, record) = guide.samples(), guide.Autoencoder(), ran["Autoencoder"]

    def init(key):
        return model.init(key, data["x"], method=lambda module, x: module.decode(module.encode(x)))

    def loss(params, batch):
        code = model.apply({"params": params}, batch["x"], method="encode")
        restored = model.apply({"params": params}, code, method="decode")
        losses = ((restored - batch["x"]) ** 2).mean(axis=-1) + 1e-3 * jnp.abs(code).mean(axis=-1)
        return losses.mean()

    check(record, list(by_hand(init, loss, data)))
    code = model.apply(trainer.state.variables, data["x"], method="encode")
    np.testing.assert_allclose(trainer.predict([{"x": data["x"]}]), code, rtol=1e-6, atol=1e-7)


def test_setup_and_compact_train_alike(ran):
    for (one, _, _), (other, _, _) in zip(ran["WithSetup"][1].trees, ran["Compact"][1].trees, strict=True):
        assert_same(one, other)


def test_the_parameter_starts_where_its_initialiser_says(ran):
    scale = ran["Scaled"][1].trees[0][0]["scale"]
    assert scale.shape == (4,)
    assert 0 < np.abs(scale - 1).max() < 0.5
