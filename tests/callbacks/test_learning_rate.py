"""`LearningRate` against the schedules that the optimizers were given."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainkit as tk
from tests.helpers.infos import Recorder, make_info
from tests.helpers.weight import Weight
from trainkit._core.cadence import Every
from trainkit._core.state import TrainState
from trainkit.callbacks import LearningRate

PARAMS = {"body": np.ones((2,), np.float32), "head": np.ones((3,), np.float32)}
SCHEDULE = optax.exponential_decay(1.0, transition_steps=10, decay_rate=0.5)


def make_state(tx):
    return TrainState.create(apply_fn=None, params=jax.tree.map(jnp.asarray, PARAMS), tx=tx)


def run(callback, state, steps, every):
    """Trains with a step that takes the buffers of its state, and returns what was written."""
    step = jax.jit(lambda state: state.apply_gradients(grads=state.params), donate_argnums=0)
    writer = Recorder()
    callback.on_fit_start(make_info(state=state, writer=writer))
    for number in range(1, steps + 1):
        state = step(state)
        if number % every == 0:
            callback.on_step(make_info(number, state=state))
            assert len(writer.rows) == number // every - 1
    callback.on_fit_end(make_info(steps, state=state))
    return writer.rows


@pytest.mark.parametrize(
    ("tx", "callback"),
    [
        pytest.param(
            optax.inject_hyperparams(optax.sgd)(learning_rate=SCHEDULE), LearningRate(), id="injected"
        ),
        pytest.param(optax.sgd(SCHEDULE), LearningRate(schedule=SCHEDULE), id="schedule"),
    ],
)
def test_writes_what_the_last_update_used(tx, callback):
    rows = run(callback, make_state(tx), steps=12, every=4)
    assert [step for step, _ in rows] == [4, 8, 12]
    for step, row in rows:
        assert list(row) == ["learning_rate"]
        np.testing.assert_allclose(row["learning_rate"], 0.5 ** ((step - 1) / 10), rtol=1e-6)


def test_several_are_labelled():
    tx = optax.chain(
        optax.clip(1.0),
        optax.partition(
            {
                "a": optax.inject_hyperparams(optax.sgd)(learning_rate=0.5),
                "b": optax.inject_hyperparams(optax.adam)(learning_rate=0.25),
            },
            {"body": "a", "head": "b"},
        ),
    )
    rows = run(LearningRate(name="lr"), make_state(tx), steps=1, every=1)
    assert rows == [(1, {"lr/a": 0.5, "lr/b": 0.25})]


def test_several_without_labels_go_by_their_paths():
    inject = optax.inject_hyperparams(optax.sgd)
    tx = optax.chain(inject(learning_rate=0.5), inject(learning_rate=0.25))
    rows = run(LearningRate(), make_state(tx), steps=1, every=1)
    assert rows == [(1, {"learning_rate/0": 0.5, "learning_rate/1": 0.25})]


def test_the_only_one_in_a_partition_has_no_label():
    tx = optax.partition(
        {"a": optax.inject_hyperparams(optax.sgd)(learning_rate=0.5), "b": optax.set_to_zero()},
        {"body": "a", "head": "b"},
    )
    assert run(LearningRate(), make_state(tx), steps=1, every=1) == [(1, {"learning_rate": 0.5})]


def test_another_hyperparameter():
    tx = optax.inject_hyperparams(optax.adamw)(learning_rate=0.5, weight_decay=0.125)
    rows = run(LearningRate(name="decay", hyperparam="weight_decay"), make_state(tx), steps=1, every=1)
    assert rows == [(1, {"decay": 0.125})]


def test_each_element_of_an_array():
    state = make_state(optax.inject_hyperparams(optax.sgd)(learning_rate=0.5))
    injected = state.opt_state._replace(hyperparams={"learning_rate": jnp.array([0.5, 0.25])})
    callback, writer = LearningRate(), Recorder()
    callback.on_fit_start(make_info(state=state, writer=writer))
    callback.on_step(make_info(1, state=state.replace(opt_state=injected)))
    callback.on_fit_end(make_info(1))
    assert writer.rows == [(1, {"learning_rate/0": 0.5, "learning_rate/1": 0.25})]


@pytest.mark.parametrize("flush", ["on_eval_start", "on_exception", "state_dict"])
def test_what_is_pending_is_written_before(flush):
    state = make_state(optax.inject_hyperparams(optax.sgd)(learning_rate=0.5))
    callback, writer = LearningRate(), Recorder()
    callback.on_fit_start(make_info(state=state, writer=writer))
    callback.on_step(make_info(50, state=state))
    assert writer.rows == []
    arguments = {"state_dict": (), "on_exception": (make_info(60), KeyError())}.get(flush, (make_info(50),))
    getattr(callback, flush)(*arguments)
    assert writer.rows == [(50, {"learning_rate": 0.5})]
    callback.on_fit_end(make_info(60))
    assert len(writer.rows) == 1


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (optax.sgd(0.1), r"no injected hyperparameters.*or pass the schedule, LearningRate\(schedule="),
        (optax.inject_hyperparams(optax.scale)(step_size=0.1), "of other names only: step_size; or pass the"),
    ],
)
def test_nothing_to_read_is_refused_at_the_start(tx, message):
    with pytest.raises(ValueError, match=message):
        LearningRate().on_fit_start(make_info(state=make_state(tx)))


def test_arguments():
    assert LearningRate().every == Every(steps=50)
    with pytest.raises(TypeError, match=r"every=50.*tk\.Every"):
        LearningRate(50)
    with pytest.raises(TypeError, match=r"schedule=0.1.*function"):
        LearningRate(schedule=0.1)


class Poisoned(tk.Trainer):
    """Takes float32[rows]; a batch of NaN gives a gradient that is not finite."""

    def loss(self, model, batch, ctx):
        return batch * model(), {}


BAD = np.full(4, np.nan, np.float32)
GOOD = np.ones(4, np.float32)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "plain"])
@pytest.mark.parametrize("make", [optax.sgd, optax.adam], ids=["sgd", "adam"])
def test_skipped_updates_do_not_move_the_rate(make, compiled):
    schedule = SCHEDULE if compiled else lambda count: float(0.5 ** (count / 10))
    given = SCHEDULE
    log = LearningRate(Every(steps=1), schedule=schedule)
    trainer = Poisoned(Weight(), make(given), callbacks=[tk.callbacks.NanGuard("skip"), log])
    result = trainer.fit([GOOD, BAD, BAD, GOOD], epochs=1)
    rates = [value for _, value in result.history["learning_rate"]]
    np.testing.assert_allclose(rates, [SCHEDULE(n) for n in (0, 0, 0, 1)], rtol=1e-6)


def test_updates_that_wait_for_others_do_not_move_the_rate():
    tx = optax.MultiSteps(optax.adam(SCHEDULE), every_k_schedule=2).gradient_transformation()
    rows = run(LearningRate(schedule=SCHEDULE), make_state(tx), steps=6, every=1)
    rates = [row["learning_rate"] for _, row in rows]
    np.testing.assert_allclose(rates, [SCHEDULE(n) for n in (0, 0, 0, 1, 1, 2)], rtol=1e-6)


def test_without_a_count_the_step_is_what_there_is():
    rows = run(LearningRate(schedule=SCHEDULE), make_state(optax.sgd(0.1)), steps=3, every=1)
    np.testing.assert_allclose(
        [row["learning_rate"] for _, row in rows], [SCHEDULE(n) for n in range(3)], rtol=1e-6
    )
