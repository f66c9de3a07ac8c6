"""The arguments of a trainer: refused early, with what was got, what is allowed and what to do. Owns no state."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import clu.metrics

from trainkit._core.cadence import as_cadence
from trainkit._engine.views import AVERAGED, LIVE
from trainkit.callbacks._callback import Callback
from trainkit.callbacks._hparams import HParams, flat_hparams
from trainkit.callbacks._log_metrics import LogMetrics
from trainkit.parallel._mesh import Mesh
from trainkit.parallel._per_example import PerExample
from trainkit.parallel._pmap import Pmap
from trainkit.parallel._strategy import Strategy


def check_callbacks(callbacks: Sequence[Callback]) -> tuple[Callback, ...]:
    """Returns the callbacks as a tuple, refusing what is none and what would collide."""
    if isinstance(callbacks, Callback):
        raise TypeError(
            f"callbacks={callbacks!r}: expected a list; write callbacks=[{type(callbacks).__name__}(...)]."
        )
    for callback in callbacks:
        if isinstance(callback, type):
            raise TypeError(
                f"callbacks has the class {callback.__name__}; pass an object, {callback.__name__}(...)."
            )
        if not isinstance(callback, Callback):
            raise TypeError(
                f"callbacks has a {type(callback).__name__}; expected tk.callbacks.Callback objects. "
                "A plain function goes into tk.callbacks.Lambda(on_step=...)."
            )
        as_cadence(callback.every, f"{type(callback).__name__}.every")
    if len({id(callback) for callback in callbacks}) != len(callbacks):
        raise ValueError("callbacks has the same object twice; give each once.")
    staging = [type(callback).__name__ for callback in callbacks if callback._stages() is not None]
    if len(staging) > 1:
        raise ValueError(
            f"callbacks has {' and '.join(staging)}, and one alone says what is trained. Give all patterns to one "
            "Finetune."
        )
    names = [hook.name for callback in callbacks if (hook := callback.step_hook()) is not None]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two callbacks keep state under state.hooks[{twice[0]!r}]; give one another name=.")
    probes = [probe.name for callback in callbacks if (probe := callback.step_probe()) is not None]
    twice = sorted({name for name in probes if probes.count(name) > 1})
    if twice:
        raise ValueError(f"two callbacks have a probe named {twice[0]!r}; give one another name=.")
    _check_views([view.name for callback in callbacks if (view := callback.eval_view()) is not None])
    return tuple(callbacks)


def _check_views(names: list[str]) -> None:
    for name in names:
        if not isinstance(name, str) or name in (AVERAGED, LIVE):
            raise ValueError(
                f"a callback gives a view with the name {name!r}; give it another name=, a str: 'averaged' is the "
                "first view whatever its name, and 'live' the state itself."
            )
        if names.count(name) > 1:
            raise ValueError(f"two callbacks give a view with the name {name!r}; give one another name=.")


def with_defaults(callbacks: tuple[Callback, ...], *, logs_hparams: bool) -> tuple[Callback, ...]:
    """Returns the callbacks with those that a trainer has unless it is given its own."""
    if not any(isinstance(callback, LogMetrics) for callback in callbacks):
        callbacks = (LogMetrics(), *callbacks)
    if not logs_hparams or any(isinstance(callback, HParams) for callback in callbacks):
        return callbacks
    # Last of all: at the end of a fit it looks at what the others have written.
    return (*callbacks, HParams())


def check_hparams(hparams: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Returns the hyperparameters, refusing what could not be logged."""
    if hparams is None:
        return {}
    flat_hparams("Trainer(hparams=...)", hparams)
    return hparams


def check_metrics(collection: object) -> None:
    """Refuses a `metrics` that is no collection."""
    if not (inspect.isclass(collection) and issubclass(collection, clu.metrics.Collection)):
        raise TypeError(
            f"metrics={collection!r}: expected a subclass of clu.metrics.Collection, decorated with "
            "@flax.struct.dataclass, e.g. with the field `loss: metrics.Average.from_output('loss')`."
        )


def check_accumulate(accumulate: int, *, own_step: bool) -> int:
    """Returns `accumulate`, refusing what can't be."""
    if not isinstance(accumulate, int) or isinstance(accumulate, bool) or accumulate < 1:
        raise ValueError(f"accumulate={accumulate!r}: must be an int of at least 1, batches per update.")
    if accumulate > 1 and own_step:
        raise ValueError(
            f"accumulate={accumulate} needs the train_step of trainkit, and this trainer has its own. Accumulate "
            "there, e.g. with optax.MultiSteps, or leave accumulate out."
        )
    return accumulate


def check_steps_per_call(steps: Any) -> int | None:
    """Returns the number of steps, None for "auto"; refuses all else."""
    if steps == "auto":
        return None
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps_per_call={steps!r}: must be 'auto' or an int of at least 1.")
    return steps


def check_interrupt(interrupt: str) -> str:
    """Returns what follows from Ctrl-C, refusing what is no choice."""
    if interrupt not in ("return", "raise"):
        raise ValueError(
            f"interrupt={interrupt!r}: the choices are 'return', for the result as of any other fit, and 'raise', for "
            "KeyboardInterrupt."
        )
    return interrupt


def check_dry_run(steps: int | None) -> int | None:
    """Returns the steps of a dry run, refusing what is no number of them."""
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise ValueError(f"dry_run={steps!r}: must be an int of at least 1, the steps to try, or None.")
    return steps


def check_length(epochs: int | None, steps: int | None) -> None:
    """Refuses all but exactly one of `epochs` and `steps`, a positive int."""
    if (epochs is None) == (steps is None):
        given = "neither" if epochs is None else "both"
        raise ValueError(f"fit takes exactly one of epochs= and steps=; got {given}. Write e.g. epochs=20.")
    for name, value in (("epochs", epochs), ("steps", steps)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name}={value!r}: must be an int of at least 1.")


_BY_NAME = {"jit": Mesh, "vmap": PerExample, "pmap": Pmap}


def resolve_strategy(strategy: str | Strategy, batch_axis: Any = 0) -> Strategy:
    """Returns the strategy that `strategy` names, or is.

    Args:
        strategy: of the trainer.
        batch_axis: of the trainer.

    Raises:
        ValueError: no strategy has that name, it can't take a batch that is one unit, or there is no such axis.
        TypeError: neither a name nor a strategy.
    """
    if batch_axis not in (0, None) or isinstance(batch_axis, bool):
        raise ValueError(
            f"batch_axis={batch_axis!r}: must be 0, the examples along the first dimension of every leaf, or None, "
            "a batch that is one unit."
        )
    found = _named(strategy)
    if batch_axis is None and not found.takes_units:
        raise ValueError(
            f"batch_axis = None and the strategy {type(found).__name__}: it divides a batch along its first dimension, "
            "which a batch that is one unit has not. Use strategy='jit', which holds it whole on each device."
        )
    return found


def _named(strategy: str | Strategy) -> Strategy:
    if isinstance(strategy, Strategy):
        return strategy
    names = ", ".join(map(repr, _BY_NAME))
    if isinstance(strategy, type):
        raise TypeError(
            f"strategy={strategy.__name__}: got the class; pass an object, {strategy.__name__}()."
        )
    if not isinstance(strategy, str):
        raise TypeError(f"strategy={strategy!r}: expected a name ({names}) or a Strategy.")
    if strategy not in _BY_NAME:
        raise ValueError(f"strategy={strategy!r}: the names are {names}.")
    return _BY_NAME[strategy]()
