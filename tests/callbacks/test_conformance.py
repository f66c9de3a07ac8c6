"""Every callback keeps what is promised of one, on one device; `multi_device/test_callbacks.py` has the layouts."""

import inspect

import pytest

import trainkit as tk
from tests.callbacks.registry import REGISTRY
from trainkit.testing import check_callback

# Base classes and values; `Checkpoint` has tests of its own for all of this.
NOT_CALLBACKS = {"Callback", "Checkpoint"}


@pytest.mark.parametrize("name", REGISTRY)
def test_a_callback_keeps_its_promises(name):
    assert isinstance(REGISTRY[name](), getattr(tk.callbacks, name.split(":")[0]))
    check_callback(REGISTRY[name])


def test_no_callback_is_left_out():
    known = vars(tk.callbacks).items()
    classes = {
        name for name, value in known if inspect.isclass(value) and issubclass(value, tk.callbacks.Callback)
    }
    assert {name.split(":")[0] for name in REGISTRY} == classes - NOT_CALLBACKS
