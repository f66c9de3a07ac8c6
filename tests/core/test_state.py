"""`TrainState` with and without a trainer, as Flax's users use theirs."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState as FlaxTrainState

import trainkit as tk
from tests.helpers.compare import assert_same
from tests.helpers.digits import Net, arrays


@pytest.fixture
def model():
    return Net(rate=0.0)


@pytest.fixture
def variables(model):
    return model.init(jax.random.key(0), arrays()["x"], train=False)


def make(model, variables, tx=None, **kwargs):
    return tk.TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=tx or optax.adam(1e-2),
        **kwargs,
    )


def hand_step(state, batch):
    """The step of Flax's guides, on any state with `batch_stats`."""

    def loss(params):
        logits, updated = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            batch["x"],
            train=True,
            mutable=["batch_stats"],
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean(), updated

    grads, updated = jax.grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=updated["batch_stats"])


class FlaxState(FlaxTrainState):
    batch_stats: Any


def test_equals_flax_own_state_after_steps(model, variables):
    ours = make(model, variables)
    theirs = FlaxState.create(
        apply_fn=model.apply, params=variables["params"], tx=ours.tx, batch_stats=variables["batch_stats"]
    )
    step = jax.jit(hand_step)
    for _ in range(5):
        ours, theirs = step(ours, arrays()), step(theirs, arrays())
    for name in ("params", "opt_state", "batch_stats"):
        assert_same(getattr(ours, name), getattr(theirs, name))
    assert int(ours.step) == int(theirs.step) == 5


def test_the_second_step_compiles_nothing(model, variables):
    traced = []

    @jax.jit
    def step(state, batch):
        traced.append(1)
        return hand_step(state, batch)

    state = make(model, variables, rng=jax.random.key(1))
    for _ in range(3):
        state = step(state, arrays())
    assert len(traced) == 1


def test_scan_vmap_and_pmap_take_it(model, variables):
    # Not adam: where a gradient is zero but for rounding, it turns the rounding into whole steps.
    state = make(model, variables, tx=optax.sgd(0.1), rng=jax.random.key(1))
    batch = arrays()
    expected = hand_step(hand_step(state, batch), batch)
    scanned, _ = jax.jit(lambda s: jax.lax.scan(lambda s, _: (hand_step(s, batch), None), s, length=2))(state)
    assert_same(scanned.params, expected.params, rtol=1e-5, atol=1e-6)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
    pair = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), batch)
    mapped = jax.vmap(hand_step)(stacked, pair)
    one = hand_step(state, batch)
    assert_same(jax.tree.map(lambda leaf: leaf[1], mapped.params), one.params, rtol=1e-5, atol=1e-6)
    single = jax.tree.map(lambda leaf: leaf[None], state)
    replica = jax.pmap(hand_step)(single, jax.tree.map(lambda leaf: leaf[None], batch))
    assert_same(jax.tree.map(lambda leaf: leaf[0], replica.params), one.params, rtol=1e-5, atol=1e-6)


def test_variables_and_model_state(model, variables):
    extra = {**variables, "counts": {"seen": jnp.zeros(())}}
    state = tk.TrainState.from_variables(apply_fn=model.apply, variables=extra, tx=optax.sgd(0.1))
    assert_same(state.variables, dict(extra))
    assert sorted(state.model_state) == ["batch_stats", "counts"]
    plain = tk.TrainState.create(apply_fn=model.apply, params=variables["params"], tx=optax.sgd(0.1))
    assert sorted(plain.variables) == ["params"]
    assert plain.batch_stats == {}
    assert plain.collections == {}
    assert plain.model_state == {}


def test_apply_gradients_takes_updated_collections(model, variables):
    state = tk.TrainState.from_variables(
        apply_fn=model.apply, variables={**variables, "counts": {"seen": jnp.zeros(())}}, tx=optax.sgd(0.5)
    )
    grads = jax.tree.map(jnp.ones_like, state.params)
    stats = jax.tree.map(lambda leaf: leaf + 3, state.batch_stats)
    new = state.apply_gradients(
        grads=grads, model_state={"batch_stats": stats, "counts": {"seen": jnp.ones(())}}
    )
    assert_same(new.batch_stats, stats)
    assert float(new.collections["counts"]["seen"]) == 1
    assert_same(new.params, jax.tree.map(lambda p: p - 0.5, state.params))
    only_counts = state.replace_model_state({"counts": {"seen": jnp.ones(())}})
    assert_same(only_counts.batch_stats, state.batch_stats)
    with pytest.raises(ValueError, match="other collections"):
        state.replace_model_state({"params": {}})


def test_frozen_dicts(model, variables):
    frozen = flax.core.freeze(variables)
    new = jax.jit(hand_step)(make(model, frozen), arrays())
    assert isinstance(new.params, flax.core.FrozenDict)
    # What `apply` returns is never frozen, so a state that is to keep its structure starts from plain dicts.
    state = tk.TrainState.from_variables(apply_fn=model.apply, variables=frozen, tx=optax.adam(1e-2))
    assert state.variables == dict(variables)
    assert_same(flax.core.unfreeze(new.params), jax.jit(hand_step)(make(model, variables), arrays()).params)


class WithExtra(tk.TrainState):
    scale: Any
    label: str = flax.struct.field(pytree_node=False, default="a")


def test_subclass_with_required_fields(model, variables):
    state = WithExtra.create(
        apply_fn=model.apply, params=variables["params"], tx=optax.sgd(0.1), scale=jnp.full((2,), 3.0)
    )
    assert len(jax.tree.leaves(state.scale)) == 1
    doubled = jax.jit(lambda s: s.replace(scale=s.scale * 2))(state)
    assert_same(doubled.scale, jnp.full((2,), 6.0))
    assert doubled.label == "a"


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_serialization_with_a_typed_key(model, variables, impl):
    state = make(
        model, variables, rng=jax.random.key(5, impl=impl), hooks={"noise": jax.random.key(6, impl=impl)}
    )
    state = jax.jit(hand_step)(state, arrays())
    template = make(
        model, variables, rng=jax.random.key(0, impl=impl), hooks={"noise": jax.random.key(0, impl=impl)}
    )
    restored = flax.serialization.from_bytes(template, flax.serialization.to_bytes(state))
    assert_same(jax.tree.leaves(restored), jax.tree.leaves(state))
    assert jax.random.key_impl(restored.rng) == jax.random.key_impl(state.rng)
    draw = jax.random.normal(state.hooks["noise"], (3,))
    np.testing.assert_array_equal(jax.random.normal(restored.hooks["noise"], (3,)), draw)


def test_serialization_of_a_subclass(model, variables):
    state = WithExtra.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=optax.sgd(0.1),
        scale=jnp.ones(2),
        rng=jax.random.key(3),
    )
    restored = flax.serialization.from_bytes(
        state.replace(scale=jnp.zeros(2)), flax.serialization.to_bytes(state)
    )
    assert_same(np.asarray(restored.scale), np.ones(2, np.float32))


def test_params_are_required():
    with pytest.raises(ValueError, match="no 'params'"):
        tk.TrainState.from_variables(apply_fn=None, variables={"batch_stats": {}}, tx=optax.sgd(0.1))
