"""`LinenModel`: how a `flax.linen` module is initialised, bound and run. Owns no state."""

import inspect
from typing import Any

import flax.core
import flax.linen as nn
import jax

from trainkit._core.typing import Variables
from trainkit._models.model import Model, ScopedFunction
from trainkit._models.precision import Precision
from trainkit._models.watch import Run, Watch, with_those_of, without


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
        self.module, self._precision, self._watch = module, precision, Watch()
        self.apply_fn = module.apply

    def init(self, fn: ScopedFunction, rng: jax.Array, *args: Any) -> dict[str, Any]:
        def attempt(run: Run) -> Any:
            # What is sown is there to be read back, "intermediates" too, which init leaves out unless told.
            return nn.init(run.marking(fn), self.module, mutable=True)(run.keys(rng), *args)

        return without(self._watch.settle("init", frozenset(), attempt), self._watch.sown)

    def apply(
        self, fn: ScopedFunction, variables: Variables, rng: jax.Array, *args: Any, train: bool
    ) -> tuple[Any, dict[str, Any]]:
        def attempt(run: Run) -> Any:
            fixed = flax.core.DenyList(("params", *run.fixed))
            apply = nn.apply(run.marking(fn), self.module, mutable=fixed)
            return apply(without(variables, run.sown), *args, rngs=run.keys(rng))

        # In evaluation the state stays as it is, but what the loss reads back from `sow` must still be there.
        kept = frozenset[str]() if train else frozenset(variables) - {"params"}
        if not self._precision.is_mixed:
            result, updated = self._watch.settle("train" if train else "eval", kept, attempt)
            return result, self._carried(updated, variables)
        variables = {**variables, "params": self._precision.to_compute(variables["params"])}
        with nn.intercept_methods(_CastCalls(self._precision)):
            result, updated = self._watch.settle("train" if train else "eval", kept, attempt)
        return result, self._carried(updated, variables)

    def _carried(self, updated: Variables, variables: Variables) -> dict[str, Any]:
        sown = self._watch.sown
        return with_those_of(without(updated, sown), variables, sown)


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
