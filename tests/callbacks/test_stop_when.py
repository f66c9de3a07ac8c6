"""`StopWhen`: strictly below or above, in each evaluation or at the end of each pass."""

import math

import numpy as np
import pytest

import trainkit as tk
from tests.helpers.infos import evaluations, make_info
from tests.helpers.runs import TEN, Script, saving
from tests.helpers.weight import numbers, trainer
from trainkit.callbacks import Phase, Plan, Stop, StopWhen
from trainkit.testing import check_callback


def stops_at(stopping, values, **kwargs):
    """The number of the evaluation, from 0, that stopped; None if none did."""
    stopping.on_fit_start(make_info(**kwargs))
    returned = evaluations(stopping, values)
    return next((number for number, action in enumerate(returned) if isinstance(action, Stop)), None)


@pytest.mark.parametrize(
    ("limit", "values", "expected"),
    [
        ({"below": 0.5}, [0.7, 0.5, 0.49], 2),
        ({"above": 0.5}, [0.3, 0.5, 0.51], 2),
        ({"below": 0}, [0.0, -1e-9], 1),
        ({"above": np.float32(3)}, [math.nan, math.inf], 1),
        ({"below": 1.0}, [math.nan, math.inf, 1.0], None),
        ({"below": 1.0}, [-math.inf], 0),
    ],
    ids=str,
)
def test_the_limit_itself_does_not_stop(limit, values, expected):
    assert stops_at(StopWhen("eval/loss", **limit), values) == expected


def test_a_fit_stops_in_the_evaluation_that_crosses_it_and_says_why():
    script = Script({2: 3.0, 4: 0.25, 6: 0.1})
    result = trainer(script, StopWhen("eval/loss", below=0.3)).fit(
        TEN, epochs=1, eval_data=script.data, eval_every=tk.Every(steps=2)
    )
    assert result.step == 4
    assert result.stopped_by == "stop when eval/loss is below 0.3: it is 0.25 at step 4"


def test_training_metrics_are_those_of_a_pass_and_looked_at_when_it_is_done():
    # The mean of a pass is 2, though its steps reach 3.
    result = trainer(StopWhen("train/loss", above=2.5)).fit(numbers(1, 2, 3), epochs=2)
    assert (result.step, result.stopped_by) == (6, None)
    result = trainer(StopWhen("train/loss", above=1.5)).fit(numbers(1, 2, 3), epochs=2)
    assert (result.step, result.stopped_by) == (3, "stop when train/loss is above 1.5: it is 2 at step 3")


def test_a_resumed_fit_that_was_stopped_is_over(tmp_path):
    script = Script({2: 3.0, 4: 0.25})
    results = [
        saving(tmp_path, script, StopWhen("eval/loss", below=0.3)).fit(
            TEN, epochs=1, eval_data=script.data, eval_every=tk.Every(steps=2), resume=True
        )
        for _ in range(2)
    ]
    assert results[0].step == results[1].step == 4
    assert results[0].stopped_by == results[1].stopped_by


def test_names_that_are_not_there():
    with pytest.raises(ValueError, match=r"StopWhen monitors 'evl/loss'.*begin with one of: eval/, train/"):
        StopWhen("evl/loss", below=1).on_fit_start(make_info())
    stopping = StopWhen("eval/los", below=1)
    stopping.on_fit_start(make_info())
    with pytest.raises(ValueError, match="the names are: eval/acc, eval/loss"):
        stopping.on_eval_end(make_info(10, {"eval/loss": 1.0, "eval/acc": 0.5}))
    stopping = StopWhen("train/los", below=1)
    with pytest.raises(ValueError, match="the names are: train/loss"):
        trainer(stopping).fit(numbers(1), epochs=1)
    with pytest.raises(ValueError, match="Pass eval_data="):
        StopWhen("eval/loss", below=1).on_fit_start(make_info(plan=Plan()))


@pytest.mark.parametrize("limits", [{}, {"below": 1, "above": 2}], ids=str)
def test_exactly_one_limit_is_given(limits):
    with pytest.raises(ValueError, match="exactly one of below= and above="):
        StopWhen("eval/loss", **limits)


@pytest.mark.parametrize("limit", [math.nan, math.inf, "1", True, (1,)], ids=str)
def test_a_limit_is_a_finite_number(limit):
    with pytest.raises(ValueError, match=r"StopWhen\(below=.*must be a finite number"):
        StopWhen("eval/loss", below=limit)


def test_a_name_is_a_str():
    with pytest.raises(TypeError, match="full name of a metric"):
        StopWhen(3, below=1)


def test_only_a_metric_of_passes_has_the_passes_parted():
    for name, reads in (("eval/loss", False), ("train/loss", True)):
        stopping = StopWhen(name, below=1)
        stopping.on_fit_start(make_info())
        assert stopping.reads_epoch is reads
    assert StopWhen.phase is Phase.MONITOR


def test_conformance():
    check_callback(lambda: StopWhen("train/loss", above=1e9))
