"""Models of several makes, against the loop by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.compare import assert_same
from tests.guides._guides import Record, keys, load

guide = load("own_models")
STEPS = 20


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


@pytest.mark.parametrize("make", [guide.WithSetup, guide.Compact, guide.Scaled, guide.WithForeign])
def test_every_step_is_that_of_the_loop_by_hand(make, check):
    data, model, record = guide.samples(), make(), Record()

    def loss(params, batch):
        y = model.apply({"params": params}, batch["x"])
        return optax.l2_loss(y, batch["y"]).mean(axis=-1).mean()

    guide.Regression(model, optax.adam(1e-2), callbacks=[record]).fit([data], steps=STEPS)
    check(record, list(by_hand(lambda key: model.init(key, data["x"]), loss, data)))


def test_several_methods_are_those_of_the_loop_by_hand(check):
    data, model, record = guide.samples(), guide.Autoencoder(), Record()

    def init(key):
        return model.init(key, data["x"], method=lambda module, x: module.decode(module.encode(x)))

    def loss(params, batch):
        code = model.apply({"params": params}, batch["x"], method="encode")
        restored = model.apply({"params": params}, code, method="decode")
        losses = ((restored - batch["x"]) ** 2).mean(axis=-1) + 1e-3 * jnp.abs(code).mean(axis=-1)
        return losses.mean()

    trainer = guide.Reconstruction(model, optax.adam(1e-2), callbacks=[record])
    trainer.fit([data], steps=STEPS)
    check(record, list(by_hand(init, loss, data)))
    code = model.apply(trainer.state.variables, data["x"], method="encode")
    np.testing.assert_allclose(trainer.predict([{"x": data["x"]}]), code, rtol=1e-6, atol=1e-7)


def test_setup_and_compact_train_alike():
    states = [
        guide.Regression(model, optax.adam(1e-2)).fit([guide.samples()], steps=5).state
        for model in (guide.WithSetup(), guide.Compact())
    ]
    assert_same(states[0].params, states[1].params)


def test_the_parameter_starts_where_its_initialiser_says():
    state = guide.Regression(guide.Scaled(), optax.adam(1e-2)).init(guide.samples())
    scale = np.asarray(state.params["scale"])
    assert scale.shape == (4,)
    assert 0 < np.abs(scale - 1).max() < 0.5


def test_the_example_runs():
    losses = guide.main()
    assert list(losses) == ["WithSetup", "Compact", "Scaled", "WithForeign", "Autoencoder"]
    assert losses["WithSetup"] == losses["Compact"]
