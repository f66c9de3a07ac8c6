"""Layers in fp8: their scales are replaced by their gradient, as Flax's own `TrainState` does."""

import flax.linen as nn
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainkit as tk
from tests.helpers.compare import assert_same

SCALES = "_overwrite_with_gradient"
RNG = np.random.default_rng(0)
BATCHES = [{"x": RNG.normal(size=(8, 16)).astype(np.float32) * 2**i} for i in range(4)]
TX = optax.adam(1e-2)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16, dot_general_cls=nn.Fp8DirectDotGeneralOp)(x))
        return nn.Dense(16)(x)


class Fp8Trainer(tk.Trainer):
    def loss(self, model, batch, ctx):
        return (model(batch["x"]) ** 2).mean(-1), {}


def loss_by_hand(variables, batch):
    return (Net().apply(variables, batch["x"]) ** 2).mean()


@jax.jit
def step_by_hand(state, batch):
    return state.apply_gradients(grads=jax.grad(loss_by_hand)(state.params, batch))


def states_by_hand(trainer, batches):
    """The state after each batch, by a loop with Flax's own `TrainState`."""
    variables = jax.device_get(trainer.init(BATCHES[0])).variables
    state = flax.training.train_state.TrainState.create(apply_fn=Net().apply, params=variables, tx=TX)
    states = [state]
    for batch in batches:
        states.append(step_by_hand(states[-1], batch))
    return states


def test_scales_move_as_in_a_loop_with_the_state_of_flax():
    trainer = Fp8Trainer(Net(), TX)
    start, *_, end = states_by_hand(trainer, BATCHES)
    result = trainer.fit(BATCHES, epochs=1)
    assert_same(result.state.variables, end.params, rtol=1e-5, atol=1e-6)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), start.params[SCALES], end.params[SCALES])
    assert all(jax.tree.leaves(moved))


def test_an_own_step_hands_the_gradient_of_all_variables_to_the_state():
    class Own(Fp8Trainer):
        def train_step(self, state, batch):
            loss, grads = jax.value_and_grad(loss_by_hand)(state.variables, batch)
            return state.apply_gradients(grads=grads), {"loss": loss}

    trainer = Own(Net(), TX)
    end = states_by_hand(trainer, BATCHES)[-1]
    assert_same(trainer.fit(BATCHES, epochs=1).state.variables, end.params, rtol=1e-5, atol=1e-6)


def test_scales_over_micro_batches_are_those_of_the_joined_batch():
    parts = [{"x": part} for batch in BATCHES for part in np.split(batch["x"], [5])]
    trainer = Fp8Trainer(Net(), optax.sgd(1e-3), accumulate=2)
    joined = Fp8Trainer(Net(), optax.sgd(1e-3)).fit(BATCHES, epochs=1).state
    got = trainer.fit(parts, epochs=1).state
    assert_same(got.collections[SCALES], joined.collections[SCALES], rtol=1e-5, atol=1e-6)
    assert_same(got.params, joined.params, rtol=1e-4, atol=1e-5)


def test_float16_leaves_the_scales_as_they_were_where_an_update_is_skipped():
    trainer = Fp8Trainer(Net(), optax.sgd(1e-3), precision="float16")
    before = jax.device_get(trainer.fit(BATCHES[:1], steps=1).state.collections)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(before))
    after = trainer.fit([{"x": np.full((8, 16), np.inf, np.float32)}], steps=1).state
    assert int(after.hooks["loss_scale"].skipped) == 1
    assert_same(jax.device_get(after.collections), before)


def test_vmap_refuses_scales_of_a_batch():
    one_device = tk.parallel.PerExample(devices=jax.local_devices()[:1])
    trainer = Fp8Trainer(Net(), TX, strategy=one_device)
    with pytest.raises(ValueError, match=r"fp8 layers.*strategy='jit'"):
        trainer.fit([{"x": jnp.ones((8, 1, 16))}], steps=1)


def test_replicas_take_the_largest_of_their_scales():
    devices = jax.local_devices()
    trainer = Fp8Trainer(Net(), TX, strategy=tk.parallel.Pmap(devices=devices))
    end = states_by_hand(trainer, BATCHES)[-1]
    result = trainer.fit(BATCHES, epochs=1)
    assert_same(result.state.collections[SCALES], end.params[SCALES], rtol=1e-4, atol=1e-6)
