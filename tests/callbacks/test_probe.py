"""`Probe` against the loop by hand, and what its function may return."""

import jax.numpy as jnp
import optax
import pytest

import trainkit as tk
from tests.helpers.weight import Weight, WeightTrainer, numbers
from trainkit.callbacks import Probe

EACH = tk.Every(steps=1)


def fit(*probes, data=None):
    trainer = WeightTrainer(Weight(), optax.sgd(0.5), callbacks=probes)
    return trainer.fit(numbers(1, 2, 4) if data is None else data, epochs=1).history


def moved(values):
    return values.updates["w"]


def test_a_scalar_a_mapping_and_a_cadence():
    # The gradient of the weight is the mean of the batch, and the update half of it, downwards.
    history = fit(
        Probe(moved, every=EACH),
        Probe(lambda v: {"grad": v.grads["w"], "rows": len(v.batch)}, every=tk.At(steps=(2,)), name="of"),
    )
    assert history["moved"] == [(1, -0.5), (2, -1.0), (3, -2.0)]
    assert history["of/grad"] == [(2, 2.0)]
    assert history["of/rows"] == [(2, 4.0)]


def test_arguments():
    with pytest.raises(TypeError, match=r"Probe\(fn=3\): expected a function of tk\.hooks\.StepValues"):
        Probe(3)
    with pytest.raises(ValueError, match="needs name="):
        Probe(lambda values: values.loss)
    with pytest.raises(TypeError, match="every=5"):
        Probe(moved, every=5)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda v: v.batch, ValueError, r"returned p as float32\[4\]; it must be a scalar\. Reduce it"),
        (lambda v: {"a": {"b": v.loss}}, TypeError, r"returned p/a as dict; it must return a real scalar"),
        (lambda v: None, TypeError, "returned p as NoneType"),
        (lambda v: v.loss + jnp.complex64(1j), TypeError, r"returned p as complex64\[\]"),
    ],
)
def test_what_the_function_may_not_return(returned, error, message):
    with pytest.raises(error, match=message):
        fit(Probe(returned, name="p"))


def test_numbers_of_python_and_bools():
    history = fit(
        Probe(lambda v: {"one": 1, "yes": True, "is": v.loss > 1}, every=tk.At(steps=(2,)), name="p")
    )
    assert [history[f"p/{name}"] for name in ("one", "yes", "is")] == [[(2, 1.0)]] * 3
