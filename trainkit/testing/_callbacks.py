"""The proof of a callback. Owns what is promised of one."""

import contextlib
import copy
import tempfile
from collections.abc import Callable
from typing import Any

import flax.serialization
import jax
import optax

from trainkit._core.cadence import At
from trainkit._core.state import TrainState, with_raw_key
from trainkit._loop.result import FitResult
from trainkit._trainer.trainer import Trainer
from trainkit.callbacks._callback import Callback
from trainkit.callbacks._checkpoint import Checkpoint
from trainkit.callbacks._info import Info
from trainkit.callbacks._lambda import Lambda
from trainkit.hooks._hook import StepHook
from trainkit.testing._classifier import Net, NetTrainer, examples
from trainkit.testing._promises import equal, holds, promised


def check_callback(make: Callable[[], Callback]) -> None:
    """Proves that a callback runs, remembers and can be used again.

    It serves two fits of a small classifier that logs `train/loss` and `eval/loss`, whose rate is in
    `optax.inject_hyperparams`, and one of another run, in which it must begin afresh. Its `state_dict` goes through
    msgpack into a new one, and back. New ones serve a fit under each strategy, and a run that is broken off and
    resumed, which must end as the one that never was: the same train state bit for bit, the same names in the log at
    the same steps.

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
    trainer, closed = _trainer(callback), _count_closes(callback)
    with promised("a callback serves a first fit"):
        whole = _fit(trainer)
        state = jax.device_get(with_raw_key(whole.state))
        rows = _rows(whole)
    once = copy.deepcopy(callback.state_dict())
    with promised("a callback serves a second fit"):
        _fit(trainer)
    expected = 2 * callback.implements("close")
    holds(len(closed) == expected, f"close is called once for each fit: {len(closed)} times in two")
    _check_state_dict(callback, make)
    trainer.reset()
    with promised("a callback serves another run"):
        _fit(trainer)
    equal("in another run a callback begins afresh; see Callback.reset", callback.state_dict(), once)
    for strategy in ("vmap", "pmap"):
        with promised(f"a callback serves a fit under strategy={strategy!r}"):
            _fit(_trainer(make(), strategy=strategy))
    _check_resumed(make, state, rows)


class _Failing(Callback):
    """Ends a fit in its `on_fit_start`, after which only `on_exception` and `close` of the others are called."""

    class Raised(Exception):
        pass

    def on_fit_start(self, info: Any) -> None:
        raise self.Raised


def _trainer(*callbacks: Callback, **options: Any) -> Trainer:
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    return NetTrainer(Net(norm=False), tx, callbacks=callbacks, **options)


def _fit(trainer: Trainer, **options: Any) -> FitResult:
    rows = 2 * trainer._engine.strategy.shards
    data = [examples(rows, seed) for seed in range(3)]
    return trainer.fit(data, epochs=2, eval_data=data, **options)


def _count_closes(callback: Callback) -> list[None]:
    """Returns a list that gets an entry each time that the callback is closed."""
    closed: list[None] = []
    close = callback.close

    def counted() -> None:
        closed.append(None)
        close()

    vars(callback)["close"] = counted
    return closed


def _rows(result: FitResult) -> dict[str, list[int]]:
    """Returns at which steps each name was logged."""
    return {name: [step for step, _ in pairs] for name, pairs in result.history.items()}


def _check_resumed(make: Callable[[], Callback], state: TrainState, rows: dict[str, list[int]]) -> None:
    def broken(info: Info) -> None:
        raise _Failing.Raised

    with tempfile.TemporaryDirectory(prefix="trainkit-check-") as logdir:
        save, fail = Checkpoint(At(steps=(2,))), Lambda(every=At(steps=(4,)), on_step=broken)
        with contextlib.suppress(_Failing.Raised):
            _fit(_trainer(make(), save, fail, logdir=logdir), resume=True)
        with promised("a callback serves a run that was broken off and is resumed"):
            result = _fit(_trainer(make(), Checkpoint(At(steps=(2,))), logdir=logdir), resume=True)
        resumed = jax.device_get(with_raw_key(result.state))
    equal("a run that is resumed ends as the one that never was broken off", resumed, state)
    told = "a run that is resumed logs each name at the steps at which one that never was broken off does"
    holds(_rows(result) == rows, f"{told}: {_rows(result)} instead of {rows}")


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
