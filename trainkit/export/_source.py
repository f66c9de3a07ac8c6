"""From a trainer, or a module with its variables, to one pure function of flat lists. Owns no file format."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.export
import numpy as np

from trainkit._core.tree import describe, is_key, named_leaves
from trainkit._core.typing import Batch, PyTree, Variables
from trainkit.export._serialize import Packed, pack
from trainkit.export._spec import BATCH, ArraySpec, names_of, spec_of, structure_of


@runtime_checkable
class Exportable(Protocol):
    """An object that can be exported whole, such as a trainer."""

    def _exportable(self, weights: str) -> tuple[Callable[[PyTree, Batch], PyTree], PyTree]:
        """Returns a pure function of `(arrays, batch)` that predicts with `train=False`, and its arrays."""
        ...


@runtime_checkable
class Module(Protocol):
    """What has variables beside it, such as a `flax.linen.Module`."""

    apply: Callable[..., Any]


Source = Exportable | tuple[Module, Variables]
"""A trainer, or a module with the variables it is applied to."""


class Traced(NamedTuple):
    """A model ready to be lowered for any batch size.

    Attributes:
        function: of two lists, the raw arrays of `weights` and the inputs; returns the list of outputs.
        weights: what the first list holds.
        inputs: specification by name, in the order of the second list.
        outputs: specification by name, in the order of the result.
        shapes: of the second list, with a symbolic batch dimension.
        structure: containers of the outputs, see `structure_of`.
        arguments: containers of the inputs, as example shapes.
        spread: whether the inputs are several positional arguments, or one tree.
    """

    function: Callable[[list[Any], list[Any]], list[Any]]
    weights: Packed
    inputs: dict[str, ArraySpec]
    outputs: dict[str, ArraySpec]
    shapes: list[jax.ShapeDtypeStruct]
    structure: Any
    arguments: tuple[PyTree, ...]
    spread: bool


def trace(
    source: Source,
    example: PyTree,
    *,
    weights: str,
    method: str | Callable[..., Any] | None,
    kwargs: Mapping[str, Any] | None,
) -> Traced:
    """Runs the model abstractly on `example` with a symbolic batch size; see `trainkit.export.save`.

    Raises:
        TypeError: `source` is neither of the two kinds, or an input is no array.
        ValueError: the inputs have no common batch dimension, or an option does not go with `source`.
    """
    spread = not isinstance(source, Exportable) and type(example) is tuple
    arguments = example if spread else (example,)
    function, arrays = _resolve(source, weights, method, kwargs)
    inputs = dict(zip(names_of(example, "input"), _specs(example), strict=True))
    shapes = _symbolic(inputs)
    arrays = jax.tree.map(_as_jax_sees_it, arrays)
    packed = pack(arrays)
    flat = _flatten(function, arrays, packed, arguments)
    with _any_batch_size():
        result = jax.eval_shape(flat.tree, list(packed.arrays.values()), shapes)
    outputs = dict(zip(names_of(result, "output"), map(spec_of, jax.tree.leaves(result)), strict=True))
    structure = structure_of(result)
    return Traced(flat.leaves, packed, inputs, outputs, shapes, structure, arguments, spread)


class _Flat(NamedTuple):
    tree: Callable[[list[Any], list[Any]], PyTree]
    leaves: Callable[[list[Any], list[Any]], list[Any]]


def _flatten(
    function: Callable[..., PyTree], arrays: PyTree, packed: Packed, arguments: tuple[PyTree, ...]
) -> _Flat:
    arrays_tree, inputs_tree = jax.tree.structure(arrays), jax.tree.structure(arguments)
    impls = [packed.impls.get(name) for name in packed.arrays]

    def tree(raw: list[Any], inputs: list[Any]) -> PyTree:
        typed = [
            leaf if impl is None else jax.random.wrap_key_data(leaf, impl=impl)
            for leaf, impl in zip(raw, impls, strict=True)
        ]
        return function(jax.tree.unflatten(arrays_tree, typed), *jax.tree.unflatten(inputs_tree, inputs))

    def leaves(raw: list[Any], inputs: list[Any]) -> list[Any]:
        return jax.tree.leaves(tree(raw, inputs))

    return _Flat(tree, leaves)


def _resolve(
    source: Source,
    weights: str,
    method: str | Callable[..., Any] | None,
    kwargs: Mapping[str, Any] | None,
) -> tuple[Callable[..., PyTree], PyTree]:
    if isinstance(source, Exportable):
        if method is not None or kwargs:
            raise ValueError(
                "method= and kwargs= go with (module, variables); of a trainer predict_step is exported. "
                "Call the method there, or export (module, trainer.state.variables)."
            )
        return source._exportable(weights)
    if not (isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], Module)):
        raise TypeError(
            f"source is {_kind(source)}; expected a trainer, or a pair (module, variables) with the "
            "variables that module.init returned, e.g. (module, state.variables)."
        )
    if weights not in ("averaged", "ema", "live"):
        raise ValueError(
            f"weights={weights!r} of a pair (module, variables), which has one kind: the choices are "
            "'averaged', 'ema' and 'live', without effect. Names of views go with a trainer."
        )
    module, variables = source
    if inspect.isclass(module):
        raise TypeError(f"source has the class {module!r}; pass an object, (Model(...), variables).")
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"source has variables of type {_kind(variables)}; expected the collections by name, "
            "{'params': ...}, e.g. state.variables."
        )
    chosen = {} if method is None else {"method": method}
    return functools.partial(module.apply, **chosen, **(kwargs or {})), variables


def _specs(example: PyTree) -> list[ArraySpec]:
    leaves = named_leaves(example)
    for name, leaf in leaves:
        if not hasattr(leaf, "shape") or is_key(leaf) or leaf.dtype.kind in "OUSMm":
            raise TypeError(
                f"example has {name} as {describe(leaf)}; inputs are arrays of numbers. Convert it, or fix "
                "it at export with kwargs= or in predict_step."
            )
    sizes = {name: leaf.shape[0] for name, leaf in leaves if leaf.shape}
    if len(set(sizes.values())) != 1:
        found = ", ".join(f"{name} {size}" for name, size in sizes.items()) or "none, all inputs are 0-d"
        raise ValueError(
            "example: the leading dimension of every input that is not 0-d is the batch, and must be the "
            f"same. Found: {found}."
        )
    shapes = [(BATCH, *leaf.shape[1:]) if leaf.shape else () for _, leaf in leaves]
    dtypes = [(str(jax.dtypes.canonicalize_dtype(leaf.dtype)), str(leaf.dtype)) for _, leaf in leaves]
    return [
        ArraySpec(shape, dtype, given if given != dtype else "")
        for shape, (dtype, given) in zip(shapes, dtypes, strict=True)
    ]


def _symbolic(inputs: Mapping[str, ArraySpec]) -> list[jax.ShapeDtypeStruct]:
    (batch,) = jax.export.symbolic_shape(BATCH)
    return [
        jax.ShapeDtypeStruct(tuple(batch if size == BATCH else size for size in spec.shape), spec.dtype)
        for spec in inputs.values()
    ]


def _as_jax_sees_it(leaf: Any) -> Any:
    """Returns NumPy arrays and Python numbers in the dtype that JAX computes with; the rest as it is."""
    if isinstance(leaf, jax.Array):
        return leaf
    array = np.asarray(leaf)
    return array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)


@contextlib.contextmanager
def _any_batch_size() -> Iterator[None]:
    """Adds to JAX's error about a symbolic size what it means here."""
    try:
        yield
    except jax.errors.InconclusiveDimensionOperation as error:
        error.add_note(
            "trainkit: the model is exported for every batch size, and this line of it needs to know which. "
            "Write it without comparing or converting that size, e.g. x.reshape((x.shape[0], -1))."
        )
        raise


def _kind(value: object) -> str:
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else type(value).__name__
