"""`Lambda`: functions as hooks."""

import pytest

from tests.helpers.infos import make_info
from trainkit._core.cadence import At, Every
from trainkit.callbacks import Callback, Lambda, Stop

HOOKS = [
    *("on_fit_start", "on_epoch_start", "on_step", "on_eval_start", "on_eval_end", "on_epoch_end"),
    *("on_save", "on_fit_end", "on_exception", "close"),
]
OTHERS = ["state_dict", "load_state_dict", "step_hook", "step_probe", "eval_view"]


def test_the_hooks_are_those_of_callbacks():
    methods = {
        name for name in vars(Callback) if not name.startswith("_") and callable(getattr(Callback, name))
    }
    assert methods == {*HOOKS, *OTHERS, "implements", "reset"}


@pytest.mark.parametrize("given", HOOKS)
def test_only_what_is_given_is_implemented(given):
    callback = Lambda(**{given: lambda *arguments: arguments})
    assert [hook for hook in HOOKS + OTHERS if callback.implements(hook)] == [given]


@pytest.mark.parametrize("given", HOOKS)
def test_calls_what_is_given(given):
    arguments = {"close": (), "on_exception": (make_info(), KeyError())}.get(given, (make_info(),))
    callback = Lambda(**{given: lambda *got: got})
    assert getattr(callback, given)(*arguments) == arguments


def test_what_a_function_returns_is_returned():
    callback = Lambda(on_step=lambda info: Stop("enough") if info.step >= 10 else None)
    assert callback.on_step(make_info(9)) is None
    assert callback.on_step(make_info(10)) == Stop("enough")


def test_cadence():
    assert Lambda().every == Every(steps=1)
    assert Lambda(every=At(steps=3)).every == At(steps=3)
    with pytest.raises(TypeError, match=r"every=50.*tk\.Every"):
        Lambda(every=50)


def test_unknown_names_and_things_that_are_no_functions_are_refused():
    with pytest.raises(TypeError, match="on_batch_end"):
        Lambda(on_batch_end=print)
    with pytest.raises(TypeError, match=r"Lambda\(on_step='print'\): expected a function"):
        Lambda(on_step="print")
