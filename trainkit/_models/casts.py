"""Mixed precision around the calls of a module: what is cast when the loss calls it. Owns no dtype and no variables."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp

from trainkit._models.model import ScopedFunction
from trainkit._models.precision import Precision


class CastCalls:
    """An interceptor that casts what a call of a module from the loss takes, returns, and reads of `params`.

    Between the calls the variables are those the module was bound to, in their own dtype: what the loss itself
    computes from parameters, such as a penalty, is as exact as without a policy.

    Args:
        precision: the dtypes.
    """

    def __init__(self, precision: Precision) -> None:
        self._precision = precision
        self._inside = False
        # With the scopes themselves, so that their ids are not used again.
        self._held: dict[int, tuple[Any, Any, dict[str, Any]]] = {}

    def watching(self, fn: ScopedFunction) -> ScopedFunction:
        """Returns `fn`, a function of a bound module, such that all of the module reads parameters from one place."""

        def watched(module: nn.Module, *args: Any) -> Any:
            self._hold(module.scope)
            return fn(module, *args)

        return watched

    def __call__(
        self, method: ScopedFunction, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
    ) -> Any:
        scope = context.module.scope
        if self._inside or scope is None:
            return method(*args, **kwargs)
        with self._cast_params(scope.root):
            if context.method_name == "setup":
                return method(*args, **kwargs)
            args, kwargs = self._precision.to_compute((args, kwargs))
            return self._precision.to_output(method(*args, **kwargs))

    @contextlib.contextmanager
    def _cast_params(self, root: Any) -> Iterator[None]:
        held = self._held.get(id(root)) or self._hold(root)
        self._inside = True
        try:
            if held is not None:
                _fill(held[2], self._precision.to_compute(held[1]))
            yield
        finally:
            self._inside = False
            if held is not None:
                _fill(held[2], held[1])

    def _hold(self, root: Any) -> Any:
        """Gives a root scope a copy of the nest of its parameters: scopes below keep references into it."""
        params = root._variables.get(
            "params"
        )  # no public accessor; a scope of one module reads them from there
        if not isinstance(params, Mapping):
            return None
        copy = _copied(params)
        root._variables["params"] = copy
        self._held[id(root)] = (root, params, copy)
        return self._held[id(root)]


def in_dtypes_of(old: Any, new: Any) -> Any:
    """Returns a collection with its floats in the dtypes they had, where the structure is the same.

    Args:
        old: the collection before, None where there was none.
        new: after.
    """
    if jax.tree.structure(flax.core.unfreeze(old)) != jax.tree.structure(new):
        return new

    def like(leaf: Any, before: Any) -> Any:
        dtype = jnp.result_type(before)
        both = jnp.issubdtype(dtype, jnp.floating) and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        return leaf.astype(dtype) if both and leaf.dtype != dtype else leaf

    return jax.tree.map(like, new, flax.core.unfreeze(old))


def _copied(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def _fill(nest: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping):
            _fill(nest[key], value)
        else:
            nest[key] = value
