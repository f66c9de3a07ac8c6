"""`LinenModel`: how a `flax.linen` module is initialised, bound and run. Owns no state."""

import inspect
from typing import Any

import flax.core
import flax.linen as nn
import jax

from trainkit._core.typing import Variables
from trainkit._models.model import Model, ScopedFunction
from trainkit._models.precision import Precision


def _is_sown(collection: Any) -> bool:
    """Says whether a collection made by `init` holds sown values: `sow` gathers them in tuples by default."""
    leaves = jax.tree.leaves(collection, is_leaf=lambda node: isinstance(node, tuple))
    return any(isinstance(leaf, tuple) for leaf in leaves)


class LinenModel(Model):
    """A `flax.linen` module.

    Args:
        module: an unbound `flax.linen.Module`.
        precision: the dtypes in which it computes and returns.

    Raises:
        TypeError: it is no such module, or the class instead of an object.
    """

    def __init__(self, module: nn.Module, precision: Precision) -> None:
        if inspect.isclass(module) and issubclass(module, nn.Module):
            raise TypeError(
                f"model={module.__name__}: got the class; pass an object, {module.__name__}(...)."
            )
        if not isinstance(module, nn.Module):
            raise TypeError(f"model: expected a flax.linen.Module, got {type(module).__name__}.")
        self.module, self._precision = module, precision
        self.apply_fn = module.apply

    def init(self, fn: ScopedFunction, rng: jax.Array, *args: Any) -> dict[str, Any]:
        variables = nn.init(fn, self.module)(rng, *args)
        return {name: value for name, value in variables.items() if name == "params" or not _is_sown(value)}

    def apply(
        self, fn: ScopedFunction, variables: Variables, rng: jax.Array, *args: Any, train: bool
    ) -> tuple[Any, dict[str, Any]]:
        # In evaluation the state stays as it is, but what the loss reads back from `sow` must still be there.
        fixed = ("params",) if train else tuple(variables)
        run = nn.apply(fn, self.module, mutable=flax.core.DenyList(fixed))
        if not self._precision.is_mixed:
            result, updated = run(variables, *args, rngs=rng)
            return result, dict(updated)
        variables = {**variables, "params": self._precision.to_compute(variables["params"])}
        with nn.intercept_methods(_CastCalls(self._precision)):
            result, updated = run(variables, *args, rngs=rng)
        return result, dict(updated)


class _CastCalls:
    """Casts what goes into and comes out of the module's own methods, called from the loss; not within them."""

    def __init__(self, precision: Precision) -> None:
        self._precision = precision
        self._inside = False

    def __call__(
        self, method: ScopedFunction, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
    ) -> Any:
        if self._inside or context.module.path or context.method_name == "setup":
            return method(*args, **kwargs)
        self._inside = True
        try:
            args, kwargs = self._precision.to_compute((args, kwargs))
            return self._precision.to_output(method(*args, **kwargs))
        finally:
            self._inside = False
