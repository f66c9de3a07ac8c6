"""One name is written once at one step; an error names who wrote it."""

import pytest

from tests.helpers.writer_calls import CALLS, Recorder
from trainkit.writers import Attributed, Ledger


@pytest.fixture
def shared():
    return Recorder()


@pytest.fixture
def views(shared):
    ledger = Ledger()
    return Attributed(shared, "EMA", ledger), Attributed(shared, "LearningRate", ledger)


def test_two_owners_of_a_name_at_a_step_are_both_named(shared, views):
    first, second = views
    first.write_scalars(3, {"lr": 0.1})
    with pytest.raises(
        ValueError, match=r"'lr' was written twice at step 3, by EMA, then by LearningRate.*rename"
    ):
        second.write_scalars(3, {"other": 1.0, "lr": 0.2})
    assert shared.scalars == [(3, {"lr": 0.1})]
    second.write_scalars(3, {"other": 1.0})
    second.write_scalars(4, {"lr": 0.2})
    assert shared.scalars[1:] == [(3, {"other": 1.0}), (4, {"lr": 0.2})]


def test_an_owner_that_repeats_itself_is_named(views):
    views[0].write_scalars(3, {"lr": 0.1})
    with pytest.raises(ValueError, match=r"twice at step 3, both times by EMA"):
        views[0].write_scalars(3, {"lr": 0.1})


@pytest.mark.parametrize("method", [name for name in CALLS if name.startswith("write")])
def test_every_kind_is_watched(views, method):
    CALLS[method](views[0])
    with pytest.raises(ValueError, match=r"EMA.*LearningRate"):
        CALLS[method](views[1])


def test_kinds_share_the_names_of_a_step(views):
    views[0].write_texts(1, {"loss": "high"})
    with pytest.raises(ValueError, match="by EMA, then by LearningRate"):
        views[1].write_scalars(1, {"loss": 1.0})


def test_a_value_that_comes_late_is_still_watched(views):
    views[0].write_scalars(10, {"loss": 1.0})
    views[0].write_scalars(20, {"loss": 1.0})
    with pytest.raises(ValueError, match="step 10"):
        views[1].write_scalars(10, {"loss": 2.0})


def test_the_memory_is_bounded(views):
    ledger = views[0]._ledger
    for step in range(1000):
        views[0].write_scalars(step, {f"name/{step}": 1.0})
    assert sum(map(len, ledger._owners.values())) == len(ledger._owners) <= 16


def test_a_run_set_back_writes_its_steps_again(shared, views):
    ledger = views[0]._ledger
    for step in (1, 2, 3):
        views[0].write_scalars(step, {"loss": 1.0})
    ledger.rewind(1)
    views[0].write_scalars(2, {"loss": 0.5})
    with pytest.raises(ValueError, match="step 1"):
        views[0].write_scalars(1, {"loss": 0.5})
    assert shared.scalars[-1] == (2, {"loss": 0.5})


def test_names_are_str(views):
    with pytest.raises(TypeError, match="EMA wrote under the name 7"):
        views[0].write_scalars(1, {7: 1.0})


def test_closing_a_view_leaves_the_shared_writer_open(shared, views):
    views[0].close()
    assert shared.calls[-1] == "flush"
    assert "close" not in shared.calls[-1:]
    views[1].write_scalars(1, {"x": 1.0})
    assert shared.scalars == [(1, {"x": 1.0})]
