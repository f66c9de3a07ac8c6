"""Batch statistics of one batch alone, in place of running averages. Owns how they are measured; pools no batches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

_COLLECTION = "batch_stats"


class BatchStatistics:
    """An interceptor under which `nn.BatchNorm` leaves the statistics of the batch, and dropout does nothing.

    Dropout is `nn.Dropout`, and that of attention in `nn.MultiHeadDotProductAttention`.

    A layer that is called several times in one call of the model leaves those of all its calls, pooled alike.

    Attributes:
        found: paths of the layers that were seen to take statistics of the batch. It only grows: where a
            transformation takes a trace from its cache no Python runs, and nothing can be seen.
    """

    def __init__(self) -> None:
        self.found: set[tuple[str, ...]] = set()
        self._inside = False
        # With the root scopes themselves, so that their ids are not used again.
        self._calls: dict[tuple[int, tuple[str, ...]], tuple[Any, int]] = {}

    def __call__(
        self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
    ) -> Any:
        module = context.module
        if context.method_name != "__call__":
            return method(*args, **kwargs)
        if isinstance(module, nn.Dropout):
            return args[0] if args else kwargs["inputs"]
        if isinstance(module, nn.MultiHeadDotProductAttention) and module.dropout_rate:
            with _undecided(module):
                return method(*args, **{**kwargs, "deterministic": True})
        # A lifted layer holds another of its class, which does the work for it.
        if (
            not isinstance(module, nn.BatchNorm)
            or self._inside
            or not _takes_statistics(module, args, kwargs)
        ):
            return method(*args, **kwargs)
        with self._measuring(module):
            return method(*args, **kwargs)

    @contextmanager
    def _measuring(self, module: nn.BatchNorm) -> Iterator[None]:
        """Has the call inside start from nothing, so that what it leaves is its own part of a running average."""
        before = _read(module)
        self._inside = True
        try:
            _write(module, *(jnp.zeros_like(one) for one in before))
            yield
        finally:
            self._inside = False
        mean, var = (one / (1 - module.momentum) for one in _read(module))
        calls = self._count(module)
        if calls > 1:
            mean, var = _joined(*before, calls - 1, mean, var)
        _write(module, mean, var)
        self.found.add(tuple(module.path))

    def _count(self, module: nn.BatchNorm) -> int:
        scope: Any = module.scope
        key = id(scope.root), tuple(module.path)
        _, calls = self._calls.get(key, (None, 0))
        self._calls[key] = scope.root, calls + 1
        return calls + 1


@contextmanager
def _undecided(module: nn.MultiHeadDotProductAttention) -> Iterator[None]:
    """Has a layer that was made with `deterministic` take it from the call: Flax refuses both."""
    given = module.deterministic
    object.__setattr__(module, "deterministic", None)  # a bound module is frozen
    try:
        yield
    finally:
        object.__setattr__(module, "deterministic", given)


def _takes_statistics(module: nn.BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Says whether a call normalises by the batch and remembers it."""
    given = kwargs.get("use_running_average", args[1] if len(args) > 1 else None)
    running = module.use_running_average if given is None else given
    there = module.has_variable(_COLLECTION, "mean") and module.is_mutable_collection(_COLLECTION)
    return there and not running and module.momentum != 1


def _read(module: nn.BatchNorm) -> tuple[Any, Any]:
    return module.get_variable(_COLLECTION, "mean"), module.get_variable(_COLLECTION, "var")


def _write(module: nn.BatchNorm, mean: Any, var: Any) -> None:
    module.put_variable(_COLLECTION, "mean", mean)
    module.put_variable(_COLLECTION, "var", var)


def _joined(mean: Any, var: Any, calls: int, new_mean: Any, new_var: Any) -> tuple[Any, Any]:
    """Returns the statistics of `calls` calls and one more."""
    whole = mean + (new_mean - mean) / (calls + 1)
    spread = calls * (var + (mean - whole) ** 2) + new_var + (new_mean - whole) ** 2
    return whole, spread / (calls + 1)
