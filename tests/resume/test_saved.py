"""What a checkpoint holds of a run is taken up as it was written, or refused with the name of the checkpoint."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest

from trainkit._core.state import TrainState
from trainkit._resume.saved import Saved, contents_of, load_saved
from trainkit.checkpoint._store import Store

SAVED = Saved(
    step=3,
    fit=1,
    first_step=0,
    first_epoch=0,
    epoch=1,
    batch=3,
    rows=16,
    evaluation_owed=False,
    epoch_end_owed=True,
    stopped_by=None,
    choice="scanned 4",
    callbacks={"EMA": {"count": 3}},
    metrics={"spec": []},
    history={"train/loss": {"steps": np.array([3]), "values": np.array([0.5])}},
    written=("train/loss",),
    place={"epoch": (1, 2)},
)


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads what was saved, with changes to its document."""
    state = TrainState.create(apply_fn=None, params={}, tx=optax.sgd(0.1), rng=jax.random.key(0))
    host = json.loads(json.dumps(contents_of(state, SAVED, {}).host))

    def load(without=None, **changes):
        document = {name: value for name, value in {**host, **changes}.items() if name != without}
        monkeypatch.setattr(Store, "load_host", lambda self, step: (document, {}))
        return load_saved(Store(tmp_path), 3)

    return load


def test_it_comes_back(load):
    assert load() == SAVED
    assert load(without="data") == SAVED  # of an earlier version, which did not know it


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Saved)])
def test_a_value_of_another_kind_is_refused_by_name(load, tmp_path, name):
    for wrong in (1.5, [1], {"__trainkit__": "bytes", "data": ""}, {"__trainkit__": "nothing"}):
        with pytest.raises(ValueError, match=rf"checkpoint of step 3 in {tmp_path} is not as it was saved"):
            load(**{name: wrong})


@pytest.mark.parametrize("series", [3, {}, {"steps": [3], "values": [0.5]}, [3, 0.5]])
def test_a_history_that_is_none_is_refused(load, series):
    with pytest.raises(ValueError, match="the history of 'train/loss' is no series"):
        load(history={"train/loss": series})


def test_true_is_no_number_and_one_is_not_true(load):
    for changes in ({"step": True}, {"evaluation_owed": 1}, {"came_to": False}):
        with pytest.raises(ValueError, match=f"{next(iter(changes))} is of type"):
            load(**changes)


def test_what_is_missing_and_what_nobody_knows(load):
    with pytest.raises(ValueError, match="it lacks metrics"):
        load(without="metrics")
    with pytest.raises(ValueError, match="values that no run has"):
        load(others=1)
