"""Every recipe of Optax, against Optax by hand."""

import itertools

import jax
import numpy as np
import optax
import pytest

from tests.helpers.compare import assert_same
from tests.helpers.guides import keys, load, recorded

guide = load("optimizers")
STEPS = 40


def by_hand(tx, batches):
    model = guide.MLP()
    params = jax.jit(model.init)(keys()[0], batches[0]["x"])["params"]
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, batch):
        def loss(params):
            y = model.apply({"params": params}, batch["x"])
            return optax.l2_loss(y, batch["y"]).mean(axis=-1).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    for index in range(STEPS):
        params, opt_state, value = step(params, opt_state, batches[index % len(batches)])
        yield params, opt_state, {}, value


@pytest.fixture(scope="module")
def ran():
    """The history and the record of each recipe."""
    histories, _, records = recorded(guide.main)
    return dict(zip(histories, zip(histories.values(), records, strict=True), strict=True))


@pytest.mark.parametrize("name", guide.recipes())
def test_every_step_is_that_of_the_loop_by_hand(name, ran, check):
    data = guide.samples()
    batches = [{name: value[i : i + 16] for name, value in data.items()} for i in range(0, 64, 16)]
    check(ran[name][1], list(by_hand(guide.recipes()[name], batches)))


@pytest.mark.parametrize("name", guide.recipes())
def test_the_learning_rate_is_in_the_log(name, ran):
    history = ran[name][0]
    if name not in ("schedule", "chain", "injected"):
        assert "learning_rate" not in history
        return
    assert [step for step, _ in history["learning_rate"]] == [10, 20, 30, 40]
    for step, rate in history["learning_rate"]:
        assert rate == pytest.approx(float(guide.SCHEDULE(step - 1)), rel=1e-6)


def test_a_frozen_part_does_not_move(ran):
    (first, _, _), *_, (last, _, _) = ran["frozen body"][1].trees
    assert_same(last["body"], first["body"])
    assert not np.array_equal(last["head"]["kernel"], first["head"]["kernel"])


def test_multi_steps_moves_the_parameters_at_every_second_step(ran):
    kernels = [params["head"]["kernel"] for params, _, _ in ran["every second"][1].trees[:6]]
    moved = [not np.array_equal(a, b) for a, b in itertools.pairwise(kernels)]
    assert moved == [True, False, True, False, True]
