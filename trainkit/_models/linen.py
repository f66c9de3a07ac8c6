"""`LinenModel`: how a `flax.linen` module is initialised, bound and run. Owns no state."""

import contextlib
import inspect
from collections.abc import Iterator, Set
from typing import Any

import flax.core
import flax.errors
import flax.linen as nn
import jax

from trainkit._core.typing import Variables
from trainkit._models.casts import CastCalls, in_dtypes_of
from trainkit._models.model import Interceptor, Model, ScopedFunction
from trainkit._models.precision import Precision
from trainkit._models.statistics import BatchStatistics
from trainkit._models.watch import Run, Watch, with_those_of, without


@contextlib.contextmanager
def _explained_first_call() -> Iterator[None]:
    """Adds to an error about variables that are not there yet how they come to be."""
    missing = (
        flax.errors.ScopeCollectionNotFound,
        flax.errors.ScopeParamNotFoundError,
        flax.errors.ScopeVariableNotFoundError,
        KeyError,
    )
    try:
        yield
    except missing as error:
        if not isinstance(error, KeyError) or error.args == ("params",):
            error.add_note(
                "trainkit: this was the initialisation, where a module has no variables before it is first called: "
                "model.variables, model.unbind() and ctx.params are empty. Call it once before they are read, e.g. "
                "`if model.is_initializing(): model(batch['x'])`, or override init_variables."
            )
        raise


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
        self._module, self._precision, self._watch = module, precision, Watch()
        self.apply_fn = module.apply
        self._measures: BatchStatistics | None = None

    def init(self, fn: ScopedFunction, rng: jax.Array, *args: Any) -> dict[str, Any]:
        def attempt(run: Run) -> Any:
            # What is sown is there to be read back, "intermediates" too, which init leaves out unless told.
            with _explained_first_call():
                return nn.init(run.marking(fn), self._module, mutable=True)(run.keys(rng), *args)

        return without(self._watch.settle("init", frozenset(), attempt), self._watch.sown)

    def apply(
        self, fn: ScopedFunction, variables: Variables, rng: jax.Array, *args: Any, train: bool
    ) -> tuple[Any, dict[str, Any]]:
        with contextlib.nullcontext() if self._measures is None else nn.intercept_methods(self._measures):
            return self._applied(fn, variables, rng, *args, train=train)

    def measuring(self) -> tuple[Model, Set[tuple[str, ...]]]:
        # A model of its own: what is seen of one while another thread traces it is not to be mixed up.
        model = LinenModel(self._module, self._precision)
        model._measures = BatchStatistics()
        return model, model._measures.found

    def _applied(
        self, fn: ScopedFunction, variables: Variables, rng: jax.Array, *args: Any, train: bool
    ) -> tuple[Any, dict[str, Any]]:
        def attempt(run: Run) -> Any:
            fixed = flax.core.DenyList(("params", *run.fixed))
            given = without(variables, run.sown)
            if not self._precision.is_mixed:
                return nn.apply(run.marking(fn), self._module, mutable=fixed)(
                    given, *args, rngs=run.keys(rng)
                )
            casts = CastCalls(self._precision)
            apply = nn.apply(run.marking(casts.watching(fn)), self._module, mutable=fixed)
            with nn.intercept_methods(casts):
                return apply(given, *args, rngs=run.keys(rng))

        # In evaluation the state stays as it is, but what the loss reads back from `sow` must still be there.
        kept = frozenset[str]() if train else frozenset(variables) - {"params"}
        result, updated = self._watch.settle("train" if train else "eval", kept, attempt)
        sown = self._watch.sown
        carried = with_those_of(without(updated, sown), variables, sown)
        if self._precision.is_mixed:
            carried = {name: in_dtypes_of(variables.get(name), value) for name, value in carried.items()}
        return result, carried

    def captured(
        self, fn: ScopedFunction, variables: Variables, rng: jax.Array, *args: Any
    ) -> dict[str, Any]:
        def attempt(run: Run) -> Any:
            fixed = flax.core.DenyList(("params", *run.fixed))
            given = without(variables, run.sown)
            casts = CastCalls(self._precision)
            fn_ = casts.watching(fn) if self._precision.is_mixed else fn
            apply = nn.apply(run.marking(fn_), self._module, mutable=fixed, capture_intermediates=True)
            cast = nn.intercept_methods(casts) if self._precision.is_mixed else contextlib.nullcontext()
            with cast:
                return apply(given, *args, rngs=run.keys(rng))

        _, updated = self._watch.settle("train", frozenset(), attempt)
        return updated["intermediates"]

    @contextlib.contextmanager
    def intercepting(self, intercept: Interceptor) -> Iterator[None]:
        paths = _Paths()

        def call(method: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
            name = f"{paths.of(context.module)} ({context.method_name})"
            if context.method_name == "setup":
                return method(*args, **kwargs)
            return intercept(name, method, args, kwargs)

        with nn.intercept_methods(call):
            yield

    def module(self, variables: Variables, rng: jax.Array) -> Any:
        return self._module.bind(variables, rngs=dict.fromkeys(self._watch.streams, rng))


class _Paths:
    """The paths of modules, which are found on the way up from them."""

    def __init__(self) -> None:
        self._root = "model"

    def of(self, module: nn.Module) -> str:
        root: Any = module
        while isinstance(root.parent, nn.Module):
            root = root.parent
        # Lifted transformations cut the way up, and try modules as roots of scopes of their own kind.
        if not root.path and type(root.parent) is flax.core.Scope:
            self._root = type(root).__name__
        return "/".join((self._root, *module.path))
