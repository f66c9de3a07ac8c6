"""`EarlyStopping` and the rule of improvement that it shares with `ReduceOnPlateau`."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers.infos import evaluations, make_info
from trainkit._core.state import TrainState
from trainkit.callbacks import EarlyStopping, Phase, Plan, ReduceOnPlateau, Stop, Update


def begin(stopping, step=0, **kwargs):
    assert stopping.on_fit_start(make_info(step, **kwargs)) is None
    return stopping


def stops_at(stopping, values):
    """The number of the evaluation, from 0, that stopped; None if none did."""
    returned = evaluations(stopping, values)
    return next((number for number, action in enumerate(returned) if isinstance(action, Stop)), None)


def make_state(value=1.0, step=0):
    params = {"w": jnp.full((3,), value)}
    state = TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1), rng=jax.random.key(3))
    return state.replace(step=jnp.asarray(step, jnp.int32))


@pytest.mark.parametrize(
    ("values", "patience", "mode", "min_delta", "expected"),
    [
        pytest.param([1, 2, 2, 2], 2, "min", 0.0, 2, id="the P-th without improvement"),
        pytest.param([1, 2, 2, 2], 1, "min", 0.0, 1, id="patience 1"),
        pytest.param([1, 1, 1], 2, "min", 0.0, 2, id="equal is not better"),
        pytest.param([1, 2, 0.5, 2, 2], 2, "min", 0.0, 4, id="an improvement counts from anew"),
        pytest.param([1, 2, 3, 4, 5], 2, "max", 0.0, None, id="max improves"),
        pytest.param([3, 2, 2], 2, "max", 0.0, 2, id="max"),
        pytest.param([1.0, 0.75, 0.75], 2, "min", 0.25, 2, id="by exactly min_delta is not enough"),
        pytest.param([1.0, 0.7, 0.4], 2, "min", 0.25, None, id="by more than min_delta is"),
        pytest.param([0.0, 0.25, 0.25], 2, "max", 0.25, 2, id="min_delta mirrored"),
        pytest.param([5, 4, 3, 2, 1], 1, "min", 0.0, None, id="always better"),
    ],
)
def test_stops_at(values, patience, mode, min_delta, expected):
    stopping = begin(EarlyStopping("eval/loss", mode=mode, patience=patience, min_delta=min_delta))
    assert stops_at(stopping, values) == expected


def test_min_delta_is_measured_from_the_best_and_not_from_the_last():
    # 0.9 is no improvement on 1.0 by more than 0.15, 0.8 is.
    stopping = begin(EarlyStopping("eval/loss", mode="min", patience=2, min_delta=0.15))
    assert stops_at(stopping, [1.0, 0.9, 0.8, 0.7, 0.66]) == 4


def test_reason():
    stopping = begin(EarlyStopping("eval/loss", mode="min", patience=2))
    action = evaluations(stopping, [0.41, 0.5, 0.5])[-1]
    assert action == Stop("early stopping: eval/loss has not improved on 0.41 (step 10) for 2 evaluations")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_non_finite_value_stops_at_once(value, mode):
    stopping = begin(EarlyStopping("eval/loss", mode=mode, patience=5))
    action = evaluations(stopping, [1.0, value])[-1]
    assert action == Stop(f"early stopping: eval/loss is {value} at step 20")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_non_finite_value_never_becomes_the_best(value, mode):
    stopping = begin(EarlyStopping("eval/loss", mode=mode, patience=3, check_finite=False))
    assert stops_at(stopping, [value, value]) is None
    assert stopping.state_dict() == {"best": None, "best_step": 0, "count": 2}
    evaluations(stopping, [2.0, value], first=3)
    assert stopping.state_dict() == {"best": 2.0, "best_step": 30, "count": 1}


def test_all_non_finite_says_so():
    stopping = begin(EarlyStopping("eval/loss", mode="min", patience=2, check_finite=False))
    assert evaluations(stopping, [math.nan] * 2)[-1] == Stop(
        "early stopping: eval/loss has not been finite in 2 evaluations"
    )


@pytest.mark.parametrize(("direction", "expected"), [("min", 1), ("max", None)])
def test_mode_follows_from_the_registered_metric(direction, expected):
    stopping = begin(EarlyStopping("eval/loss", patience=1), directions={"eval/loss": direction})
    assert stops_at(stopping, [1, 2]) == expected


def test_a_given_mode_goes_before_the_registered_one():
    stopping = begin(EarlyStopping("eval/loss", patience=1, mode="max"), directions={"eval/loss": "min"})
    assert stops_at(stopping, [1, 2]) is None


@pytest.mark.parametrize("make", [EarlyStopping, ReduceOnPlateau])
def test_mode_is_never_guessed(make):
    with pytest.raises(ValueError, match="pass mode='min' or mode='max'"):
        make("eval/loss").on_fit_start(make_info())


@pytest.mark.parametrize("make", [EarlyStopping, ReduceOnPlateau])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patience": 0}, r"patience=0\): must be an int, 1 or more; with less .* evaluation"),
        ({"patience": -1}, "patience=-1"),
        ({"patience": 2.0}, "patience=2.0"),
        ({"patience": True}, "patience=True"),
        ({"mode": "auto"}, "mode='auto'.*'min' or 'max'"),
        ({"min_delta": -0.1}, "min_delta=-0.1"),
        ({"min_delta": math.nan}, "min_delta=nan"),
    ],
)
def test_arguments_out_of_range(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make("eval/loss", **arguments)


@pytest.mark.parametrize("make", [EarlyStopping, ReduceOnPlateau])
def test_monitor_must_be_a_name(make):
    with pytest.raises(TypeError, match="full name of a metric"):
        make(("eval/loss", "min"))


@pytest.mark.parametrize(
    ("name", "eval_names", "message"),
    [
        ("loss", ("eval", "test"), "begin with one of: eval/, test/, train/.$"),
        ("valid/loss", ("eval",), "begin with one of: eval/, train/.$"),
        ("eval/loss", (), "begin with one of: train/. Pass eval_data="),
    ],
)
def test_a_name_that_can_not_appear_is_refused_at_the_start(name, eval_names, message):
    with pytest.raises(ValueError, match=message):
        EarlyStopping(name, mode="min").on_fit_start(make_info(plan=Plan(eval_names=eval_names)))


def test_a_name_that_did_not_appear_is_refused_at_the_first_evaluation():
    stopping = begin(EarlyStopping("eval/los", mode="min"))
    with pytest.raises(
        ValueError, match=r"'eval/los', which is not there; the names are: eval/acc, eval/loss\."
    ):
        stopping.on_eval_end(make_info(10, {"eval/loss": 1.0, "eval/acc": 0.5}))


def test_an_array_is_refused():
    stopping = begin(EarlyStopping("eval/confusion", mode="min"))
    with pytest.raises(ValueError, match=r"shape \(2, 2\); monitor a single number"):
        stopping.on_eval_end(make_info(10, {"eval/confusion": np.eye(2)}))


def test_training_metrics_are_counted_at_the_end_of_epochs():
    stopping = begin(EarlyStopping("train/loss", mode="min", patience=1))
    assert stopping.on_eval_end(make_info(10, {"eval/loss": 1.0})) is None
    assert stopping.on_epoch_end(make_info(20, {"train/loss": 1.0})) is None
    action = stopping.on_epoch_end(make_info(40, {"train/loss": 2.0}))
    assert action == Stop("early stopping: train/loss has not improved on 1 (step 20) for 1 epoch")


def test_evaluation_metrics_are_not_looked_for_at_the_end_of_epochs():
    stopping = begin(EarlyStopping("eval/loss", mode="min", patience=1))
    assert stopping.on_epoch_end(make_info(20, {"train/loss": 1.0})) is None


def test_an_evaluation_source_named_train_is_an_evaluation():
    stopping = begin(EarlyStopping("train/loss", mode="min", patience=1), plan=Plan(eval_names=("train",)))
    assert stops_at(stopping, []) is None
    returned = evaluations(stopping, [1.0, 2.0], name="train/loss")
    assert isinstance(returned[-1], Stop)


def test_survives_a_resume_through_json():
    values = [3.0, 2.0, 2.5, 2.5, 2.5, 2.5]
    for cut in range(1, 5):
        before = begin(EarlyStopping("eval/loss", mode="min", patience=4))
        evaluations(before, values[:cut])
        after = EarlyStopping("eval/loss", mode="min", patience=4)
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        begin(after, step=10 * cut)
        returned = evaluations(after, values[cut:], first=cut + 1)
        assert returned[:-1] == [None] * (len(values) - cut - 1)
        assert returned[-1] == Stop(
            "early stopping: eval/loss has not improved on 2 (step 20) for 4 evaluations"
        )


def test_a_run_resumed_from_the_step_of_its_stop_is_over():
    before = begin(EarlyStopping("eval/loss", mode="min", patience=1))
    stop = evaluations(before, [1.0, 2.0])[-1]
    after = EarlyStopping("eval/loss", mode="min", patience=1)
    after.load_state_dict(before.state_dict())
    assert after.on_fit_start(make_info(20)) == stop
    patient = EarlyStopping("eval/loss", mode="min", patience=2)
    patient.load_state_dict(before.state_dict())
    assert patient.on_fit_start(make_info(20)) is None


def test_a_second_fit_goes_on_and_does_not_stop_again_at_once():
    stopping = begin(EarlyStopping("eval/loss", mode="min", patience=2))
    assert stops_at(stopping, [1.0, 2.0, 2.0]) == 2
    begin(stopping, step=30)
    returned = evaluations(stopping, [1.5, 1.5], first=4)
    assert returned == [
        None,
        Stop("early stopping: eval/loss has not improved on 1 (step 10) for 2 evaluations"),
    ]


def test_a_second_fit_after_no_stop_keeps_the_count():
    stopping = begin(EarlyStopping("eval/loss", mode="min", patience=2))
    assert stops_at(stopping, [1.0, 2.0]) is None
    begin(stopping, step=20)
    assert stops_at(stopping, [2.0]) == 0


def test_another_run_begins_afresh():
    stopping = begin(EarlyStopping("eval/loss", mode="min", patience=2, restore_best=True))
    evaluations(stopping, [1.0, 2.0, 2.0], state=make_state())
    stopping.reset()
    begin(stopping, step=30)
    assert stopping.state_dict() == {"best": None, "best_step": 0, "count": 0}
    assert stopping.on_fit_end(make_info(30)) is None
    assert stops_at(EarlyStopping("eval/loss", mode="min", patience=2), []) is None


def test_restores_the_whole_best_state_from_a_copy():
    stopping = begin(EarlyStopping("eval/loss", mode="min", patience=5, restore_best=True))
    for number, (loss, value) in enumerate([(3.0, 1.0), (1.0, 2.0), (2.0, 3.0)], 1):
        state = make_state(value, step=10 * number)
        stopping.on_eval_end(make_info(10 * number, {"eval/loss": loss}, state=state))
        # What the next step does to the buffers it is given.
        for leaf in jax.tree.leaves(state):
            leaf.delete()
    action = stopping.on_fit_end(make_info(30))
    assert isinstance(action, Update)
    best, expected = action.fn(make_state(4.0)), make_state(2.0, step=20)
    assert jax.tree.structure(best.opt_state) == jax.tree.structure(expected.opt_state)
    np.testing.assert_array_equal(jax.random.key_data(best.rng), jax.random.key_data(expected.rng))
    for got, wanted in zip(
        jax.tree.leaves(best.replace(rng=None)), jax.tree.leaves(expected.replace(rng=None)), strict=True
    ):
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)


def test_nothing_to_restore_where_no_evaluation_came():
    stopping = begin(EarlyStopping("eval/loss", mode="min", restore_best=True))
    assert stopping.on_fit_end(make_info(5)) is None


def test_the_best_state_from_before_a_resume_is_restored():
    first = begin(EarlyStopping("eval/loss", mode="min", restore_best=True))
    first.on_eval_end(make_info(10, {"eval/loss": 1.0}, state=make_state(2.0, step=10)))
    second = EarlyStopping("eval/loss", mode="min", restore_best=True)
    second.load_state_dict(first.state_dict())
    begin(second, step=20)
    second.on_eval_end(make_info(30, {"eval/loss": 3.0}, state=make_state(5.0, step=30)))
    action = second.on_fit_end(make_info(50))
    assert isinstance(action, Update)
    best = action.fn(make_state(4.0, step=50))
    assert int(best.step) == 10
    for got, wanted in zip(
        jax.tree.leaves(best.params), jax.tree.leaves(make_state(2.0, step=10).params), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)


def test_runs_among_the_monitors():
    assert EarlyStopping("eval/loss").phase is Phase.MONITOR
    assert ReduceOnPlateau("eval/loss").phase is Phase.MONITOR
    assert not EarlyStopping("eval/loss").implements("on_step")
