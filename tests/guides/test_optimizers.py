"""Every recipe of Optax, against Optax by hand."""

import jax
import numpy as np
import optax
import pytest

from tests.compare import assert_same
from tests.guides._guides import Record, keys, load

guide = load("optimizers")
STEPS = 20


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


def batches():
    data = guide.samples()
    return [{name: value[i : i + 16] for name, value in data.items()} for i in range(0, 64, 16)]


@pytest.mark.parametrize("name", guide.recipes())
def test_every_step_is_that_of_the_loop_by_hand(name, check):
    tx, record = guide.recipes()[name], Record()
    trainer = guide.Regression(guide.MLP(), tx, callbacks=[record, *guide.logs_rate(name)])
    result = trainer.fit(batches(), steps=STEPS)
    check(record, list(by_hand(tx, batches())))
    if guide.logs_rate(name):
        rates = [(step, float(guide.SCHEDULE(step - 1))) for step in (10, 20)]
        assert [step for step, _ in result.history["learning_rate"]] == [10, 20]
        np.testing.assert_allclose([r for _, r in result.history["learning_rate"]], [r for _, r in rates])


def test_a_frozen_part_does_not_move():
    trainer = guide.Regression(guide.MLP(), guide.recipes()["frozen body"])
    before = jax.device_get(trainer.init(batches()[0]).params)
    after = trainer.fit(batches(), steps=5).state.params
    assert_same(after["body"], before["body"])
    assert not np.array_equal(after["head"]["kernel"], before["head"]["kernel"])


def test_multi_steps_moves_the_parameters_at_every_second_step():
    record = Record()
    guide.Regression(guide.MLP(), guide.recipes()["every second"], callbacks=[record]).fit(batches(), steps=6)
    kernels = [params["head"]["kernel"] for params, _, _ in record.trees]
    moved = [not np.array_equal(a, b) for a, b in zip(kernels, kernels[1:], strict=False)]
    assert moved == [True, False, True, False, True]


def test_the_example_runs():
    histories = guide.main()
    assert list(histories) == list(guide.recipes())
    assert sorted(name for name in histories if "learning_rate" in histories[name]) == [
        "chain",
        "injected",
        "schedule",
    ]
