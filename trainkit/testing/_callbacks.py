"""The proof of a callback. Owns what is promised of one."""

import copy
from collections.abc import Callable
from typing import Any

import flax.serialization
import optax

from trainkit._trainer.trainer import Trainer
from trainkit.callbacks._callback import Callback
from trainkit.hooks._hook import StepHook
from trainkit.testing._classifier import Net, NetTrainer, examples
from trainkit.testing._promises import equal, holds, promised


def check_callback(make: Callable[[], Callback]) -> None:
    """Proves that a callback runs, remembers and can be used again.

    It serves two fits of a small classifier that logs `train/loss` and `eval/loss`, whose rate is in
    `optax.inject_hyperparams`, and one of another run, in which it must begin afresh; then its
    `state_dict` goes through msgpack into a new one, and back.

    Args:
        make: returns a new callback.

    Raises:
        AssertionError: a promise is broken; says which.

    Example:
        >>> from trainkit.callbacks import EarlyStopping
        >>> check_callback(lambda: EarlyStopping("eval/loss", mode="min", patience=3))
    """
    callback = make()
    holds(isinstance(callback, Callback), f"make() returns a Callback: {type(callback).__name__}")
    _check_begun_only(make())
    trainer = _trainer(callback)
    with promised("a callback serves a first fit"):
        _fit(trainer)
    once = copy.deepcopy(callback.state_dict())
    with promised("a callback serves a second fit"):
        _fit(trainer)
    _check_state_dict(callback, make)
    trainer.reset()
    with promised("a callback serves another run"):
        _fit(trainer)
    equal("in another run a callback begins afresh; see Callback.reset", callback.state_dict(), once)


class _Failing(Callback):
    """Ends a fit in its `on_fit_start`, after which only `on_exception` and `close` of the others are called."""

    class Raised(Exception):
        pass

    def on_fit_start(self, info: Any) -> None:
        raise self.Raised


def _trainer(*callbacks: Callback) -> Trainer:
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    return NetTrainer(Net(norm=False), tx, callbacks=callbacks)


def _fit(trainer: Trainer) -> None:
    data = [examples(4, seed) for seed in range(3)]
    trainer.fit(data, epochs=2, eval_data=data)


def _check_begun_only(callback: Callback) -> None:
    try:
        _fit(_trainer(callback, _Failing()))
    except _Failing.Raised as error:
        # What on_exception and close raise after the first exception is attached to it.
        raised = " ".join(getattr(error, "__notes__", ()))
    else:
        raised = "the fit did not end"
    holds(not raised, f"close works when nothing but on_fit_start was called: {raised}")


def _check_state_dict(callback: Callback, make: Callable[[], Callback]) -> None:
    state = callback.state_dict()
    holds(isinstance(state, dict), f"state_dict returns a dict: {type(state).__name__}")
    with promised("state_dict holds JSON values and arrays by str, which a checkpoint can write"):
        restored: Any = flax.serialization.msgpack_restore(flax.serialization.msgpack_serialize(state))
    other = make()
    with promised("load_state_dict takes what state_dict returned"):
        other.load_state_dict(restored)
    equal("a new callback that loaded a state_dict returns the same", other.state_dict(), state)
    with promised("a callback that loaded a state_dict serves a fit"):
        _fit(_trainer(other))
    _check_hook(callback.step_hook(), make().step_hook())


def _check_hook(hook: StepHook | None, other: StepHook | None) -> None:
    names = [None if one is None else one.name for one in (hook, other)]
    holds(names[0] == names[1], f"step_hook names one place in state.hooks, whoever made it: {names}")
