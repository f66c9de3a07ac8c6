"""The diagnosis of a step: which module, which leaf, and what it says of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import trainkit as tk
from trainkit._debug.diagnosis import diagnose
from trainkit.data._source import as_source


class Root(nn.Module):
    """The square root of its input: not a number below 0, a gradient that is infinite at 0."""

    def __call__(self, x):
        return jnp.sqrt(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(2, use_bias=False, kernel_init=nn.initializers.ones, name="body")(x)
        return Root(name="root")(x)

    def halved(self, x):
        return x / 2


class Tower(nn.Module):
    """A block, and one more of whatever comes."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, name="head")(Block(name="block")(x))[..., 0]


class Losses(tk.Trainer):
    def loss(self, model, batch, ctx):
        return model(batch["x"]) / batch["y"], {}


STRATEGIES = {
    "jit": lambda: tk.parallel.Mesh(devices=jax.devices()[:1]),
    "vmap": lambda: tk.parallel.PerExample(devices=jax.devices()[:1]),
    "pmap": lambda: tk.parallel.Pmap(devices=jax.devices()[:1]),
}


def batch_of(x=1.0, y=1.0, rows=4):
    """A batch of `rows`, all the same but the last."""
    batch = {"x": np.ones((rows, 3), np.float32), "y": np.ones(rows, np.float32)}
    batch["x"][-1], batch["y"][-1] = x, y
    return batch


def diagnosed(batch, *, model=None, kind=Losses, strategy="jit", jit=True, step=6, **options):
    """What is found of step `step` + 1 on `batch`."""
    trainer = kind(model or Tower(), optax.sgd(0.1), strategy=STRATEGIES[strategy](), **options)
    trainer.init(batch_of())
    state = trainer.state.replace(step=jnp.asarray(step, jnp.int32))
    engine = trainer._engine
    feed = engine.prepare_train(state, as_source([batch_of()]), batch_of()).feed
    fed = feed.place_group((batch_of(), batch)) if options.get("accumulate") else feed.place(batch)
    return diagnose(engine.steps, engine.strategy, engine.given(), state, fed.batch, fed.mask, jit=jit)


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_first_module_whose_output_is_not_finite(strategy, jit):
    found = diagnosed(batch_of(x=-1.0), strategy=strategy, jit=jit)
    assert (found.step, found.finite, found.first_leaf) == (7, False, "loss")
    assert (found.first_module, found.inputs_finite) == ("Tower/block/root (__call__)", True)
    assert np.isnan(found.loss)
    assert str(found) == (
        "step 7 is not finite: loss is the first leaf that is not. The first module whose output is not finite is "
        "Tower/block/root (__call__); its inputs are, so look into it and at its parameters."
    )


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"remat": True}, {"precision": "bfloat16"}])
def test_under_the_options_of_a_step(options):
    found = diagnosed(batch_of(x=-1.0), **options)
    assert (found.first_module, found.inputs_finite) == ("Tower/block/root (__call__)", True)


def test_a_batch_that_is_not_finite():
    found = diagnosed(batch_of(x=np.nan))
    assert (found.first_module, found.inputs_finite) == ("Tower/block/body (__call__)", False)
    assert "its inputs are not either, so look at the batch" in str(found)


def test_a_loss_that_is_not_finite_behind_a_model_that_is():
    found = diagnosed(batch_of(y=0.0))
    assert (found.first_module, found.inputs_finite, found.first_leaf) == (None, None, "loss")
    assert np.isinf(found.loss)
    assert str(found).endswith("The outputs of all modules are, so look at what the loss computes from them.")


def test_a_gradient_that_is_not_finite_behind_a_loss_that_is():
    found = diagnosed(batch_of(x=0.0))
    assert (found.first_module, found.first_leaf) == (None, "grads/block/body/kernel")
    assert np.isfinite(found.loss)
    assert str(found).endswith("so look at the derivatives behind it.")


@pytest.mark.parametrize("jit", [True, False])
def test_a_step_that_is_finite(jit):
    batch = batch_of()
    found = diagnosed(batch, jit=jit)
    assert found.finite
    assert str(found) == f"step 7 is finite, with a loss of {found.loss:g}."


class Several(tk.Trainer):
    """Calls a method of the model, and drops what is not finite of it."""

    def loss(self, model, batch, ctx):
        halves = model.halved(batch["x"])
        return jnp.where(jnp.isfinite(halves), halves, 0).sum(axis=-1) + 0 * model(
            jnp.abs(batch["y"])[:, None]
        )[:, 0], {}


def test_a_method_by_its_name_and_an_output_that_does_no_harm():
    found = diagnosed(batch_of(x=np.inf), model=Block(), kind=Several)
    assert (found.first_module, found.inputs_finite) == ("Block (halved)", False)
    assert found.finite
    assert str(found).endswith("although the output of Block (halved) is not.")


class Scanned(nn.Module):
    """One layer applied several times by `nn.scan`."""

    @nn.compact
    def __call__(self, x):
        layer = nn.scan(
            lambda module, carry, _: (module(carry) - 1, None),
            variable_broadcast="params",
            split_rngs={"params": False},
            length=3,
        )
        x, _ = layer(Root(name="root"), x, None)
        return nn.Dense(1, name="head")(x)[:, 0]


def test_inside_a_scan():
    # 1 -> 0 -> -1: the third round takes the root of what the second left.
    found = diagnosed(batch_of(x=1.0), model=Scanned())
    assert (found.first_module, found.first_leaf) == ("Scanned/root (__call__)", "loss")


class Own(Losses):
    def train_step(self, state, batch):
        return super().train_step(state, batch)


def test_a_step_of_ones_own():
    found = diagnosed(batch_of(x=-1.0), kind=Own)
    assert (found.first_module, found.first_leaf) == ("Tower/block/root (__call__)", "loss")


def test_the_numbers_are_those_of_the_step():
    batch = batch_of(x=0.5)
    found = diagnosed(batch)
    trainer = Losses(Tower(), optax.sgd(0.1))
    logged = trainer.fit([batch], steps=1).history.last("train/loss")
    assert found.loss == pytest.approx(logged, rel=1e-6)
