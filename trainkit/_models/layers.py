"""The calls of modules in a trace, by their paths: what went in and came out. Changes nothing that is computed."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax

from trainkit._core.flops import part
from trainkit._core.layer import Layer
from trainkit._core.tree import describe
from trainkit._core.typing import PyTree


class LayerCalls:
    """Notes the calls of modules made within `watching`, each under a name by which its operations are counted.

    Attributes:
        layers: one for each module, in the order of their first calls; the number of each is that of its part.
    """

    def __init__(self) -> None:
        self.layers: dict[str, Layer] = {}
        self._within: list[str] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within it calls are noted."""
        with nn.intercept_methods(self._call):
            yield

    def _call(
        self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
    ) -> Any:
        module, path = context.module, "/".join(context.module.path)
        # `setup` is no call, and a method that calls another of its own module is one.
        if context.method_name == "setup" or self._within[-1:] == [path]:
            return method(*args, **kwargs)
        known = self.layers.setdefault(
            path, Layer(path, type(module).__name__, inputs=_shapes((args, kwargs)))
        )
        number = list(self.layers).index(path)
        self._within.append(path)
        try:
            with jax.named_scope(part(number)):
                result = method(*args, **kwargs)
        finally:
            self._within.pop()
        known = self.layers[path]
        outputs = known.outputs or _shapes(result)
        self.layers[path] = dataclasses.replace(known, calls=known.calls + 1, outputs=outputs)
        return result


def _shapes(tree: PyTree) -> tuple[str, ...]:
    return tuple(
        describe(leaf) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    )
