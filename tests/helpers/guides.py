"""What the tests of the guides share: the example files, a record of every step, and its comparison."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

import trainkit as tk
from tests.helpers.compare import assert_same

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "guides"


def load(name):
    """Returns the example `name` as a module, without asking the import path for a package `examples`."""
    spec = importlib.util.spec_from_file_location(f"guides_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keys(seed=0):
    """The key of the initialisation and the key of the steps."""
    return jax.random.split(jax.random.key(seed))


class Record(tk.callbacks.Callback):
    """Keeps what every step left behind: parameters, optimizer state, collections, and the logged loss."""

    def __init__(self):
        self.trees, self.losses = [], []

    def on_step(self, info):
        state = info.state
        self.trees.append(jax.device_get((state.params, state.opt_state, state.model_state)))
        self.losses.append(info.metrics["train/loss"])


def recorded(main, **arguments):
    """Runs `main` of an example, and returns its result, its trainers and the record of each."""
    plain, trainers, records = tk.Trainer.__init__, [], []

    def init(self, model, tx, *, callbacks=(), **options):
        trainers.append(self)
        records.append(Record())
        plain(self, model, tx, callbacks=[*callbacks, records[-1]], **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tk.Trainer, "__init__", init)
        return main(**arguments), trainers, records


def largest_difference(record, by_hand):
    """Asserts that both have equal structures, shapes and dtypes at every step.

    Args:
        record: a `Record`.
        by_hand: per step `(params, opt_state, model_state, loss)`.

    Returns:
        The largest difference of a number in the trees, and the largest relative one of the losses.
    """
    assert len(record.trees) == len(record.losses) == len(by_hand) > 0
    trees, losses = 0.0, 0.0
    for got, logged, (*expected, loss) in zip(record.trees, record.losses, by_hand, strict=True):
        expected = jax.device_get(tuple(expected))
        # Structure, shapes and dtypes; the numbers are measured below.
        assert_same(got, expected, atol=1e30)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            trees = max(trees, float(np.abs(np.subtract(a, b, dtype=np.float64)).max(initial=0)))
        losses = max(losses, abs(float(logged) - float(loss)) / abs(float(loss)))
    return trees, losses
