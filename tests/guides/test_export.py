"""An exported model against the model itself, applied by hand."""

import numpy as np
import pytest

import trainkit as tk
from tests.helpers.guides import load, recorded

guide = load("export")


@pytest.fixture(scope="module")
def ran():
    return recorded(guide.main)[0]


@pytest.mark.parametrize("rows", [1, 3, 32])
def test_outputs_are_those_of_the_averaged_model(rows, ran, record_property):
    trainer, predictions = ran
    averaged, live = tk.callbacks.EMA.view(trainer.state).variables, trainer.state.variables
    x = guide.samples(rows)["x"]
    by_hand = np.asarray(guide.Net().apply(averaged, x, train=False))
    difference = float(np.abs(predictions[rows] - by_hand).max())
    record_property("largest difference", difference)
    print(f"largest difference {difference:.1e}")
    np.testing.assert_allclose(predictions[rows], by_hand, rtol=1e-5, atol=1e-6)
    assert np.abs(guide.Net().apply(live, x, train=False) - by_hand).max() > 1e-3
