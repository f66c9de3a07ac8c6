"""`NnxModel`: how a `flax.nnx` module is made, taken apart, put together and run. Owns no state.

A module is split once into its structure, which is static, and its variables, of which those of the state are plain
nested dicts of arrays; the structure and new arrays make a fresh module inside every trace.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from trainkit._core.typing import Variables
from trainkit._models.casts import in_dtypes_of
from trainkit._models.model import Interceptor, Model, ScopedFunction
from trainkit._models.precision import Precision

_PARAMS = "params"
_ARRAYS = "arrays"
"""The collection of arrays that a module holds as they are."""

Path = tuple[Any, ...]
"""Names of attributes, keys of dicts and indices of lists."""


class _Part(NamedTuple):
    """One variable of the module.

    Attributes:
        path: in the module.
        collection: of the state that holds its value; None for key streams.
        variable: as it was taken from the module, with shapes for arrays.
    """

    path: Path
    collection: str | None
    variable: Any


class _Template(NamedTuple):
    """What is static of a module."""

    graph: Any
    parts: tuple[_Part, ...]


class NnxModel(Model):
    """A `flax.nnx` module, or a function that makes one.

    Args:
        source: an `nnx.Module`, whose weights are the start and which is never written; or a function of `rngs`, or a
            class whose constructor wants nothing else.
        precision: the dtypes in which it computes and returns.

    Raises:
        TypeError: `source` is a class whose constructor wants more.
    """

    def __init__(self, source: Any, precision: Precision) -> None:
        self._precision = precision
        self._object = source if isinstance(source, nnx.Module) else None
        self._make = _maker(source) if self._object is None else None
        self.apply_fn = self._apply_plain
        self._intercept: Interceptor | None = None
        self._template  # noqa: B018 (what is no model is refused now)

    # Initialisation -------------------------------------------------------------------------------------------

    def init(self, fn: ScopedFunction, rng: jax.Array, *args: Any) -> dict[str, Any]:
        if self._object is None:
            assert self._make is not None
            module = _made(self._make, nnx.Rngs(rng))
        else:
            module = self._object
        values = _values(module)
        variables: dict[str, Any] = {_PARAMS: {}}
        for part in self._template.parts:
            if part.collection is not None:
                _put(variables.setdefault(part.collection, {}), part.path, values[part.path])
        return variables

    @functools.cached_property
    def _template(self) -> _Template:
        if self._object is not None:
            module = self._object
        else:
            make = self._make
            assert make is not None
            # Shapes alone: nothing is computed, also where this is first asked for inside of a trace.
            with jax.ensure_compile_time_eval():
                module = nnx.eval_shape(lambda: _made(make, nnx.Rngs(jax.random.key(0))))
        graph, state = nnx.split(module)
        found = list(nnx.to_flat_state(state))
        if any(isinstance(one, nnx.Intermediate) for _, one in found):
            # What earlier calls of the object sowed is fresh in every call here.
            module = nnx.clone(module)
            nnx.pop(module, nnx.Intermediate)
            graph, state = nnx.split(module)
            found = list(nnx.to_flat_state(state))
        parts = tuple(_Part(path, _collection(one), _abstract(one)) for path, one in found)
        _check_names(found)
        return _Template(graph, parts)

    def names(self) -> dict[str, tuple[str | None, ...]]:
        found = {}
        for path, collection, variable in self._template.parts:
            if collection == _PARAMS and (spec := variable.get_metadata().get("out_sharding")):
                shape = jnp.shape(variable.get_value())
                found["/".join(map(str, path))] = (*spec, *(None,) * (len(shape) - len(spec)))
        return found

    # Running --------------------------------------------------------------------------------------------------

    def apply(
        self, fn: ScopedFunction, variables: Variables, rng: jax.Array, *args: Any, train: bool
    ) -> tuple[Any, dict[str, Any]]:
        params = variables[_PARAMS]
        mixed = self._precision.is_mixed
        cast = {**variables, _PARAMS: self._precision.to_compute(params)} if mixed else variables
        module = self.merged(cast, rng, train=train)
        if self._intercept is not None:
            _intercepted(module, self._intercept)
        if mixed:
            module.__class__ = _casting(type(module), self._precision)
        result = fn(module, *args)
        values = _values(module)
        updated: dict[str, Any] = {}
        for part in self._template.parts:
            if part.collection not in (None, _PARAMS):
                before = _get(variables[part.collection], part.path)
                _put(updated.setdefault(part.collection, {}), part.path, values.get(part.path, before))
        if not mixed:
            return result, updated
        updated = {name: in_dtypes_of(variables[name], value) for name, value in updated.items()}
        return self._precision.to_output(result), updated

    def merged(self, variables: Variables, rng: jax.Array, *, train: bool) -> Any:
        """Returns a fresh module that holds `variables`, in `train()` or `eval()` mode.

        Every key stream has count 0 and a key of its own, `fold_in(rng, i)` for the i-th in the order of their paths.
        """
        streams, state = 0, []
        for path, collection, variable in self._template.parts:
            if collection is not None:
                value = _get(variables[collection], path)
            elif isinstance(variable, nnx.RngKey):
                key, shape = jax.random.fold_in(rng, streams), _shape(variable)
                value, streams = jax.random.split(key, shape) if shape else key, streams + 1
            else:
                value = jnp.zeros(_shape(variable), jnp.uint32)
            state.append((path, _holding(variable, value)))
        with nnx.use_eager_sharding(False):
            module = nnx.merge(self._template.graph, nnx.from_flat_state(state))
        module.train() if train else module.eval()
        return module

    @contextlib.contextmanager
    def intercepting(self, intercept: Interceptor) -> Iterator[None]:
        self._intercept = intercept
        try:
            yield
        finally:
            self._intercept = None

    def module(self, variables: Variables, rng: jax.Array) -> Any:
        return self.merged(jax.tree.map(jnp.copy, variables), rng, train=False)

    def measuring(self) -> tuple[Model, Set[tuple[str, ...]]]:
        raise TypeError(
            "batch statistics are estimated anew of flax.linen modules only: leave refresh= out of SWA, whose averages "
            "are then evaluated with the running statistics."
        )

    def _apply_plain(
        self, variables: Variables, *args: Any, rng: jax.Array | None = None, **kwargs: Any
    ) -> Any:
        """Returns what a call of the module in `eval()` mode gives: the `apply_fn` of the state."""
        key = jax.random.key(0) if rng is None else rng
        return self.merged(variables, key, train=False)(*args, **kwargs)


def _maker(source: Any) -> Callable[[nnx.Rngs], Any]:
    if not inspect.isclass(source):
        return source
    parameters = [
        one
        for one in list(inspect.signature(source.__init__).parameters.values())[1:]
        if one.default is one.empty
    ]
    wanted = [one.name for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    make: Any = source
    if wanted == ["rngs"] or (not wanted and "rngs" in inspect.signature(source.__init__).parameters):
        return lambda rngs: make(rngs=rngs)
    if len(wanted) == 1:
        return lambda rngs: make(rngs)
    raise TypeError(
        f"model={source.__name__}: its constructor wants {', '.join(wanted) or 'nothing'}; give an object, "
        f"{source.__name__}(..., rngs=nnx.Rngs(0)), or a function of rngs that makes one: lambda rngs: "
        f"{source.__name__}(..., rngs=rngs)."
    )


def _made(make: Callable[[nnx.Rngs], Any], rngs: nnx.Rngs) -> nnx.Module:
    # Where parameters lie is the strategy's to say, by their names; to divide them here would need its mesh.
    with nnx.use_eager_sharding(False):
        module = make(rngs)
    if not isinstance(module, nnx.Module):
        raise TypeError(
            f"model: expected a flax.linen.Module, a flax.nnx.Module, or a function of nnx.Rngs that makes one of the "
            f"latter; got {type(make).__name__}, which returned {type(module).__name__}."
        )
    return module


def _collection(variable: Any) -> str | None:
    """Returns the name of the collection of a variable: Flax's registered one, else that of its class."""
    if not isinstance(variable, nnx.Variable):
        return _ARRAYS
    if isinstance(variable, nnx.RngState):
        return None
    if isinstance(variable, nnx.Param):
        return _PARAMS
    if isinstance(variable, nnx.BatchStat):
        return "batch_stats"
    try:
        return nnx.variable_name_from_type(type(variable))
    except ValueError:  # none is registered
        return type(variable).__name__


def _check_names(variables: Sequence[tuple[Path, Any]]) -> None:
    """Refuses two types of variables that would share a collection."""
    types: dict[str, type] = {}
    for _, variable in variables:
        name = _collection(variable)
        if name in (None, _PARAMS, "batch_stats", _ARRAYS):
            continue
        first = types.setdefault(name, type(variable))
        if first is not type(variable):
            raise TypeError(
                f"the module has variables of two types that both are called {name!r}: {first.__module__}."
                f"{first.__qualname__} and {type(variable).__module__}.{type(variable).__qualname__}. Rename one: "
                "the collections of a train state go by their names."
            )


def _abstract(variable: Any) -> Any:
    def shape(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "shape") else leaf

    if not isinstance(variable, nnx.Variable):
        return shape(variable)
    return variable.replace(jax.tree.map(shape, variable.get_value()))


def _holding(variable: Any, value: Any) -> Any:
    return variable.replace(value, eager_sharding=False) if isinstance(variable, nnx.Variable) else value


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.get_value().shape


def _values(module: nnx.Module) -> dict[Path, Any]:
    """Returns the value of each variable of a module by its path."""
    flat = nnx.to_flat_state(nnx.split(module)[1])
    return {path: one.get_value() if isinstance(one, nnx.Variable) else one for path, one in flat}


def _put(tree: dict[Any, Any], path: Path, value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _get(tree: Mapping[Any, Any], path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


Wrap = Callable[[Any, str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""`wrap(module, name of the method, method bound, args, kwargs)` returns what the call gives."""


def _casting(cls: type, precision: Precision) -> type:
    """Returns a subclass whose methods, called from outside, take inputs and return outputs in the policy's dtypes.

    It is for one module: of two that are traced at a time, in two threads, each knows whether it is inside of itself.
    """
    inside = [False]

    def cast(module: Any, name: str, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if inside[0]:
            return method(*args, **kwargs)
        inside[0] = True
        try:
            args, kwargs = precision.to_compute((args, kwargs))
            return precision.to_output(method(*args, **kwargs))
        finally:
            inside[0] = False

    return _wrapping(cls, cast)


def _intercepted(module: nnx.Module, intercept: Interceptor) -> None:
    """Has the calls of a module and of those in it go through `intercept`."""
    root, paths = type(module).__name__, {}

    def call(one: Any, name: str, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return intercept(f"{'/'.join((root, *map(str, paths[id(one)])))} ({name})", method, args, kwargs)

    for path, one in list(nnx.iter_graph(module)):
        if isinstance(one, nnx.Module) and id(one) not in paths:
            paths[id(one)] = path
            one.__class__ = _wrapping(type(one), call)


def _wrapping(cls: type, wrap: Wrap) -> type:
    """Returns a subclass whose public methods go through `wrap`."""

    def wrapped(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def through(self: Any, *args: Any, **kwargs: Any) -> Any:
            return wrap(self, name, functools.partial(method, self), args, kwargs)

        return through

    methods: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        for name, method in vars(base).items():
            own = name == "__call__" or not (name.startswith("_") or hasattr(nnx.Module, name))
            if inspect.isfunction(method) and own:
                methods[name] = wrapped(name, method)
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), {**methods, **names})
