"""`LearningRate` against the schedules that the optimizers were given."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers.infos import Recorder, make_info
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
