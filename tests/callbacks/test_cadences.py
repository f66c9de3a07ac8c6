"""A cadence that never comes is refused, or said where a fit is too short for it."""

import logging

import pytest

import trainkit as tk
from tests.helpers.weight import numbers, trainer

ONLY_THERE = {
    "Images": lambda every: tk.callbacks.Images(lambda info: None, every=every),
    "Text": lambda every: tk.callbacks.Text(lambda info: None, every=every),
    "Figure": lambda every: tk.callbacks.Figure(lambda info: None, every=every),
    "Embedding": lambda every: tk.callbacks.Embedding(lambda info: None, every=every),
    "Watch": lambda every: tk.callbacks.Watch(every),
    "Probe": lambda every: tk.callbacks.Probe(lambda values: values.loss, every=every, name="loss"),
    "ActivationStats": lambda every: tk.callbacks.ActivationStats(every),
    "GradientNoiseScale": lambda every: tk.callbacks.GradientNoiseScale(every),
    "Throughput": lambda every: tk.callbacks.Throughput(every),
    "Memory": lambda every: tk.callbacks.Memory(every),
}


@pytest.mark.parametrize("name", ONLY_THERE)
def test_what_would_never_do_anything_is_refused(name):
    with pytest.raises(ValueError, match=r"every=Never\(\): it would never come.*tk\.Every\(steps=50\)"):
        ONLY_THERE[name](tk.Never())
    assert ONLY_THERE[name](tk.At(steps=(3,))).every == tk.At(steps=(3,))


@pytest.mark.parametrize(("step", "said"), [(3, 1), (2, 0)])
def test_a_step_behind_the_end_of_the_fit_is_said(caplog, step, said):
    look = tk.callbacks.Lambda(every=tk.At(steps=(step,)), on_step=lambda info: None)
    with caplog.at_level(logging.WARNING, "trainkit"):
        trainer(look).fit(numbers(1, 2), epochs=1)
    told = [one.getMessage() for one in caplog.records if "it is never called" in one.getMessage()]
    assert (
        told == ["Lambda is due at the steps (3,), and this fit ends at step 2: it is never called."] * said
    )
