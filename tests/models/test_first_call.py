"""Variables that a loss reads at initialisation, before they are there."""

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainkit as tk
from tests.helpers.compare import assert_same

X = np.ones((4, 3), np.float32)


class Reading(tk.Trainer):
    def loss(self, model, batch, ctx):
        penalty = (model.variables["params"]["kernel"] ** 2).sum()
        return (model(batch["x"]) ** 2).mean(-1) + penalty, {}


class Unbinding(tk.Trainer):
    first = False

    def loss(self, model, batch, ctx):
        if self.first and model.is_initializing():
            model(batch["x"])
        module, variables = model.unbind()
        return jax.vmap(lambda x: (module.apply(variables, x) ** 2).mean())(batch["x"]), {}


@pytest.mark.parametrize(
    ("kind", "error"), [(Reading, KeyError), (Unbinding, flax.errors.ScopeCollectionNotFound)]
)
def test_variables_read_before_the_first_call_are_an_error_that_names_the_cure(kind, error):
    with pytest.raises(error) as caught:
        kind(nn.Dense(2), optax.sgd(0.1)).init({"x": X})
    assert "if model.is_initializing(): model(batch['x'])" in "".join(caught.value.__notes__)


def test_the_cure_works():
    class First(Unbinding):
        first = True

    trainer = First(nn.Dense(2), optax.sgd(0.1))
    params = jax.device_get(trainer.init({"x": X})).params
    grads = jax.grad(lambda p: (nn.Dense(2).apply({"params": p}, X) ** 2).mean())(params)
    expected = jax.tree.map(lambda one, by: one - 0.1 * by, params, grads)
    assert_same(trainer.fit([{"x": X}], steps=1).state.params, expected, rtol=1e-5, atol=1e-6)


class Dropping(nn.Module):
    deterministic: bool = True

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=self.deterministic)(x))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_clone_in_the_same_scope_has_other_attributes_and_the_same_variables(precision):
    class Cloning(tk.Trainer):
        def loss(self, model, batch, ctx):
            y = model.clone(parent=model.scope, deterministic=not ctx.train)(batch["x"])
            return (y**2).mean(-1), {"y": y}

        def predict_step(self, model, batch, ctx):
            return model(batch["x"])

    trainer = Cloning(Dropping(), optax.sgd(0.1), precision=precision)
    state = jax.device_get(trainer.init({"x": X}))
    dtype = jnp.dtype(precision)

    def loss(params):
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        rngs = {"dropout": jax.random.fold_in(state.rng, 0)}
        y = Dropping(deterministic=False).apply({"params": params}, jnp.asarray(X, dtype), rngs=rngs)
        return (y.astype(jnp.float32) ** 2).mean()

    grads = jax.jit(jax.grad(loss))(state.params)
    expected = jax.tree.map(lambda one, by: one - 0.1 * by, state.params, grads)
    assert_same(trainer.fit([{"x": X}], steps=1).state.params, expected, rtol=1e-5, atol=1e-6)
