"""The arguments of a trainer: refused early, with what was got, what is allowed and what to do. Owns no state."""

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import clu.metrics

from trainkit._core.cadence import as_cadence
from trainkit._engine.engine import Engine
from trainkit._feed.leaves import parted
from trainkit._feed.stream import Stream
from trainkit._loop.run import Run
from trainkit.callbacks._callback import Callback
from trainkit.callbacks._log_metrics import LogMetrics
from trainkit.data._source import Source, as_source
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
    names = [hook.name for callback in callbacks if (hook := callback.step_hook()) is not None]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two callbacks keep state under state.hooks[{twice[0]!r}]; give one another name=.")
    return tuple(callbacks)


def with_defaults(callbacks: tuple[Callback, ...]) -> tuple[Callback, ...]:
    """Returns the callbacks with those that every trainer has unless it is given its own."""
    if any(isinstance(callback, LogMetrics) for callback in callbacks):
        return callbacks
    return (LogMetrics(), *callbacks)


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


def check_length(epochs: int | None, steps: int | None) -> None:
    """Refuses all but exactly one of `epochs` and `steps`, a positive int."""
    if (epochs is None) == (steps is None):
        given = "neither" if epochs is None else "both"
        raise ValueError(f"fit takes exactly one of epochs= and steps=; got {given}. Write e.g. epochs=20.")
    for name, value in (("epochs", epochs), ("steps", steps)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name}={value!r}: must be an int of at least 1.")


def eval_sources(eval_data: Any) -> dict[str, Source]:
    """Returns the evaluation sources by name."""
    if eval_data is None:
        return {}
    if isinstance(eval_data, Mapping):
        return {eval_name(name): as_source(data).in_order() for name, data in eval_data.items()}
    return {"eval": as_source(eval_data).in_order()}


def eval_name(name: Any) -> str:
    """Returns `name`, refusing one that the log could not hold."""
    if not isinstance(name, str) or not name or name == "train" or "/" in name:
        raise ValueError(
            f"eval_data has the name {name!r}; names are non-empty strings without '/', and not 'train'. "
            "A mapping given as eval_data maps names to sources; wrap arrays in tk.data.Arrays."
        )
    return name


def first_spec(source: Source) -> Any:
    """Returns a batch of a training source, or its shapes and dtypes; None where to look at one would cost the fit."""
    batch = next(iter(source.global_batches(0)), None) if source.seekable else None
    return None if batch is None else parted(batch.spec())[0]


def peek(engine: Engine, source: Source, run: Run) -> tuple[Any, Iterator[Any]]:
    """Returns the first batch from where the run stands in its data, and the iterator over it and the others."""
    position, placed = run.position, run.place is not None
    batches = run.open(engine, source)
    first = next(batches, None)
    if first is None and (position.batch or placed):
        # It was saved behind the last batch, which only the end of the data tells.
        position.batch = 0
        run.put_down(None)
        return peek(engine, source, run)
    if first is None:
        raise ValueError("the training source is empty: it gave no batch. Give data with at least one.")
    if not isinstance(batches, Stream):
        return first, itertools.chain([first], batches)
    batches.put_back(first)
    return first, batches


_BY_NAME = {"jit": Mesh, "vmap": PerExample, "pmap": Pmap}


def resolve_strategy(strategy: str | Strategy) -> Strategy:
    """Returns the strategy that `strategy` names, or is.

    Raises:
        ValueError: no strategy has that name.
        TypeError: neither a name nor a strategy.
    """
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
