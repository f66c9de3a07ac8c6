"""Cadences, against a list of the steps at which each is due."""

import math

import pytest

from trainkit._core.cadence import At, Every, Never, as_cadence


def due(cadence, last):
    """Returns the steps up to `last` at which `cadence` is due, following `next_step`."""
    steps, step = [], 0
    while (step := cadence.next_step(step)) <= last:
        steps.append(step)
    return steps


def test_every_counts_from_the_start_of_training():
    assert due(Every(steps=3), 10) == [3, 6, 9]
    assert Every(steps=50).next_step(75) == 100
    assert [epoch for epoch in range(1, 8) if Every(epochs=3).due_epoch(epoch)] == [3, 6]
    assert Every(epochs=2).next_step(0) == math.inf
    assert Every(seconds=0.5).next_step(0) == math.inf


def test_at_and_never():
    assert due(At(steps=(7, 2, 7)), 100) == [2, 7]
    assert due(At(steps=4), 100) == [4]
    assert due(Never(), 10**9) == []
    assert not Never().due_epoch(1)


def test_cadences_are_values():
    assert Every(steps=5) == Every(steps=5) != Every(epochs=5)
    assert len({Every(steps=5), Every(steps=5), At(steps=(1,))}) == 2


@pytest.mark.parametrize(
    "wrong", [{}, {"steps": 1, "epochs": 1}, {"steps": 0}, {"steps": 2.5}, {"seconds": -1}, {"epochs": True}]
)
def test_every_refuses(wrong):
    with pytest.raises(ValueError, match="Every"):
        Every(**wrong)


@pytest.mark.parametrize("wrong", [(), (0,), (1.5,)])
def test_at_refuses(wrong):
    with pytest.raises(ValueError, match="At"):
        At(steps=wrong)


def test_as_cadence_names_the_argument():
    with pytest.raises(TypeError, match=r"eval_every=50.*Every\(steps=50\)"):
        as_cadence(50, "eval_every")
