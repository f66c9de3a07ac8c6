"""Which checkpoints are kept."""

import math

import pytest

from trainkit.checkpoint._retention import Best, Retention, best_step

LOSS, ACCURACY = Best("eval/loss", "min"), Best("eval/accuracy", "max")


def scored(name, values):
    return {step: {} if value is None else {name: value} for step, value in values.items()}


@pytest.mark.parametrize(
    ("values", "best", "step"),
    [
        ({1: 3.0, 2: 1.0, 3: 2.0}, LOSS, 2),
        ({1: 3.0, 2: 1.0, 3: 2.0}, ACCURACY, 1),
        ({9: 1.0, 5: 1.0, 7: 1.0}, LOSS, 5),  # of equal ones the older, in whatever order they are listed
        ({9: 1.0, 5: 1.0, 7: 1.0}, ACCURACY, 5),
        ({1: math.nan, 2: 5.0, 3: math.nan}, LOSS, 2),
        ({1: math.nan, 2: 5.0, 3: math.nan}, ACCURACY, 2),
        ({1: math.inf, 2: 5.0}, LOSS, 2),
        ({1: -math.inf, 2: 5.0}, ACCURACY, 2),
        ({1: None, 2: 5.0, 3: None}, LOSS, 2),
        ({1: 0.0, 2: -0.0}, LOSS, 1),
    ],
)
def test_the_best_step(values, best, step):
    assert best_step(scored(best.name, values), best) == step


@pytest.mark.parametrize("values", [{}, {1: None}, {1: math.nan, 2: math.nan}])
def test_where_nothing_can_be_ranked_there_is_no_best(values):
    assert best_step(scored("eval/loss", values), LOSS) is None


def test_another_metric_does_not_rank():
    assert best_step({1: {"eval/accuracy": 0.1}, 2: {"eval/loss": 3.0}}, LOSS) == 2


@pytest.mark.parametrize(
    ("keep", "best", "kept"),
    [
        (1, None, {50}),
        (2, None, {40, 50}),
        (9, None, {10, 20, 30, 40, 50}),
        (None, None, {10, 20, 30, 40, 50}),
        (None, LOSS, {10, 20, 30, 40, 50}),
        (2, LOSS, {20, 40, 50}),
        (4, LOSS, {20, 30, 40, 50}),  # it is among the newest: there is no second one
        (2, ACCURACY, {40, 50}),  # never measured
    ],
)
def test_the_newest_stay_and_the_best_beside_them(keep, best, kept):
    scores = scored("eval/loss", {10: 3.0, 20: 1.0, 30: 2.0, 40: math.nan, 50: 1.0})
    assert Retention(keep, best).kept(scores) == kept


@pytest.mark.parametrize(
    ("keep", "top", "kept"),
    [
        (1, 1, {20, 50}),
        (1, 2, {20, 50}),  # 50 is as good as 20, and younger
        (1, 3, {20, 30, 50}),
        (1, 9, {10, 20, 30, 50}),  # never one that is NaN
        (2, 3, {20, 30, 40, 50}),
        (None, 1, {10, 20, 30, 40, 50}),
    ],
)
def test_the_union_of_the_newest_and_of_the_best(keep, top, kept):
    scores = scored("eval/loss", {10: 3.0, 20: 1.0, 30: 2.0, 40: math.nan, 50: 1.0})
    assert Retention(keep, LOSS, top).kept(scores) == kept
