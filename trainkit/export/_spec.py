"""What goes in and comes out of an exported model, in words that fit into JSON. Owns no model and no file."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from trainkit._core.arrays import shape_of
from trainkit._core.tree import named_leaves
from trainkit._core.typing import Array, PyTree

BATCH = "batch"
"""Name of the dimension that is free."""

_ROOT = "(root)"
_DEEPEST = 200


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Shape and dtype of one input or output.

    Args:
        shape: the dimensions; `"batch"` is free, and another name is a function of it, e.g. `"2*batch"`.
        dtype: what the exported model computes with.
        given: the dtype of the example, where JAX narrows it (int64 to int32); accepted as well.

    Example:
        >>> str(ArraySpec(("batch", 3), "float32"))
        'float32[batch, 3]'
    """

    shape: tuple[int | str, ...]
    dtype: str
    given: str = ""

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"

    def to_json(self) -> dict[str, Any]:
        """Returns what `from_json` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, stored: Any) -> "ArraySpec":
        """Returns the specification that `to_json` wrote.

        Raises:
            ValueError: it did not write that.
        """
        fields = dict(stored) if isinstance(stored, dict) else {}
        shape, dtype, given = (fields.get(name) for name in ("shape", "dtype", "given"))
        if not (isinstance(shape, list) and isinstance(dtype, str) and isinstance(given, str)):
            raise ValueError("an input or output is not described by shape and dtype")
        shape_of([1 if isinstance(size, str) else size for size in shape])
        return cls(tuple(shape), dtype, given)


def spec_of(leaf: Any, given: str = "") -> ArraySpec:
    """Returns the specification of an array or `ShapeDtypeStruct`, symbolic dimensions by name."""
    shape = tuple(size if isinstance(size, int) else str(size) for size in leaf.shape)
    return ArraySpec(shape, str(leaf.dtype), given)


def names_of(tree: PyTree, lone: str) -> list[str]:
    """Returns the paths of the leaves; `lone` for a tree that is one leaf."""
    return [lone if name == _ROOT else name for name, _ in named_leaves(tree)]


def check_inputs(specs: Mapping[str, ArraySpec], leaves: Mapping[str, Any]) -> dict[str, Array]:
    """Returns the leaves in the order of `specs`, cast where the example was.

    Raises:
        ValueError: an input is missing, unexpected, or of a wrong shape or dtype; every one is named.
    """
    arrays = {name: leaf if hasattr(leaf, "dtype") else np.asarray(leaf) for name, leaf in leaves.items()}
    lines = [f"{name}: missing, expected {spec}" for name, spec in specs.items() if name not in arrays]
    lines += [f"{name}: unexpected" for name in arrays if name not in specs]
    rows = _rows(specs, arrays)
    for name, spec in specs.items():
        if name in arrays and not _fits(spec, arrays[name], rows):
            got = f"{arrays[name].dtype}[{', '.join(map(str, arrays[name].shape))}]"
            lines.append(f"{name}: got {got}, expected {spec}")
    if lines:
        batch = "" if rows is None else f" (batch is {rows} here, from the first input that has it)"
        raise ValueError(f"the inputs do not fit the exported model{batch}:\n  " + "\n  ".join(lines))
    return {name: arrays[name].astype(spec.dtype, copy=False) for name, spec in specs.items()}


def structure_of(tree: PyTree) -> Any:
    """Returns the containers of `tree` as JSON, each leaf as its number in tree order.

    What is no dict, list, tuple or None (a named tuple, a dataclass) is described as a dict of its fields.
    """
    numbers = iter(range(len(jax.tree.leaves(tree))))

    def describe(node: PyTree) -> Any:
        if node is None:
            return None
        children = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda child: child is not node)
        if len(children) == 1 and not children[0][0]:
            return next(numbers)
        described = [[_key(path[0]), describe(child)] for path, child in children]
        if type(node) in (list, tuple):
            return {type(node).__name__: [child for _, child in described]}
        return {"dict": described}

    return describe(tree)


def check_structure(structure: Any, leaves: int) -> None:
    """Refuses what `structure_of` does not return for a tree of so many leaves.

    Raises:
        ValueError: it does not.
    """
    numbers: list[int] = []
    nodes = [(structure, 0)]
    while nodes:
        node, depth = nodes.pop()
        if type(node) is int:
            numbers.append(node)
        elif node is not None:
            nodes += [(child, depth + 1) for child in reversed(_children(node))]
        if depth > _DEEPEST:
            raise ValueError(f"the outputs are nested more than {_DEEPEST} deep")
    if numbers != list(range(leaves)):
        raise ValueError(f"the outputs are put together of others than the {leaves} that there are")


def _children(node: Any) -> list[Any]:
    kind, children = next(iter(node.items())) if isinstance(node, dict) and len(node) == 1 else ("", None)
    if isinstance(children, list):
        if kind in ("list", "tuple"):
            return children
        if kind == "dict" and all(map(_is_entry, children)):
            return [child for _, child in children]
    raise ValueError("the outputs are put together in a way that is not known")


def _is_entry(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and type(pair[0]) in (str, int)


def rebuild(structure: Any, leaves: Sequence[Any]) -> PyTree:
    """Returns the tree of `structure`, as `structure_of` described it, with `leaves` in tree order."""
    if structure is None:
        return None
    if isinstance(structure, int):
        return leaves[structure]
    ((kind, children),) = structure.items()
    if kind == "dict":
        return {key: rebuild(child, leaves) for key, child in children}
    rebuilt = [rebuild(child, leaves) for child in children]
    return rebuilt if kind == "list" else tuple(rebuilt)


def _rows(specs: Mapping[str, ArraySpec], arrays: Mapping[str, Any]) -> int | None:
    """Returns the batch size of the first input that has one."""
    found = (arrays[name].shape for name, spec in specs.items() if BATCH in spec.shape and name in arrays)
    return next((shape[0] for shape in found if shape), None)


def _fits(spec: ArraySpec, array: Any, rows: int | None) -> bool:
    wanted = tuple(rows if size == BATCH else size for size in spec.shape)
    dtype = str(array.dtype)
    return tuple(array.shape) == wanted and rows != 0 and dtype in (spec.dtype, spec.given)


def _key(entry: Any) -> str | int:
    key = getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", None)))
    return key if isinstance(key, str | int) else str(key)
