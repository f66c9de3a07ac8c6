"""Training that goes on from files and bytes, against training that was never interrupted, by hand."""

import functools

import flax
import jax
import numpy as np
import optax
import pytest

import trainkit as tk
from tests.helpers.compare import assert_same
from tests.helpers.guides import keys, load, recorded

guide = load("serialization")


def by_hand(data, steps):
    model, tx = guide.Net(), optax.adam(1e-2)
    variables = jax.jit(functools.partial(model.init, train=True))(keys()[0], data["x"])
    params, state = variables["params"], {"batch_stats": variables["batch_stats"]}
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, state, batch):
        def loss(params):
            y, updated = model.apply({"params": params, **state}, batch["x"], train=True, mutable=list(state))
            return optax.l2_loss(y, batch["y"]).mean(axis=-1).mean(), updated

        (value, updated), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, updated, value

    for index in range(steps):
        params, opt_state, state, value = step(params, opt_state, state, data)
        yield params, opt_state, state, value
        if index == 9:
            # Through Flax's bytes and back, as one does without trainkit.
            tree = (params, opt_state, state)
            params, opt_state, state = flax.serialization.from_bytes(
                jax.tree.map(np.zeros_like, tree), flax.serialization.to_bytes(tree)
            )


@pytest.fixture(scope="module")
def ran():
    return recorded(guide.main)


def test_every_step_is_that_of_the_loop_by_hand(ran, check):
    check(ran[2][0], list(by_hand(guide.samples(), 20)))


@pytest.mark.parametrize("index", [1, 2], ids=["file", "bytes"])
def test_what_went_through_bytes_goes_on_as_if_nothing_had_been(index, ran):
    results, _, records = ran
    assert_same(results[index], results[0].replace(apply_fn=results[index].apply_fn, tx=results[index].tx))
    assert records[index].losses == records[0].losses[10:]
    for got, expected in zip(records[index].trees, records[0].trees[10:], strict=True):
        assert_same(got, expected)


def test_a_template_that_differs_is_refused_with_every_path(ran, tmp_path):
    params = ran[0][0].params
    tk.save(tmp_path / "params.msgpack", params)
    other = {**params, "Dense_0": {"kernel": np.zeros((4, 8), np.float16)}, "extra": np.zeros(3)}
    with pytest.raises(ValueError, match="differ") as caught:
        tk.load(tmp_path / "params.msgpack", like=other)
    message = str(caught.value)
    assert "Dense_0/kernel: saved as float32[4, 8], like has float16[4, 8]" in message
    assert "Dense_0/bias: unexpected" in message
    assert "extra: missing" in message
