"""Host-side functions on one batch: its size, its checks and padding.

Owns the rules of what a batch is. Does not know where batches come from nor what a step does with them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trainkit._core.tree import named_leaves
from trainkit._core.typing import Batch, PyTree

# A large copy that lies where JAX on a CPU takes it as it is need not be copied again.
_ALIGNMENT, _WORTH_ALIGNING = 64, 2**17


def batch_size_of(batch: Batch) -> int:
    """Returns the number of rows of a batch: the leading size its leaves agree on, 0-d leaves aside.

    Args:
        batch: a tree of arrays `[batch, ...]`; 0-d leaves are allowed and ignored.

    Returns:
        The number of rows.

    Raises:
        ValueError: the leading sizes differ, or no leaf has a leading dimension.
    """
    rows = -1
    for leaf in jax.tree_util.tree_leaves(batch):
        shape = _shape_and_dtype(leaf)[0]
        if shape and shape[0] != rows:
            if rows >= 0:
                raise ValueError(_unequal(batch))
            rows = shape[0]
    if rows < 0:
        raise ValueError(_rowless(batch))
    return rows


def check_batch(batch: Batch) -> None:
    """Refuses a batch with a leaf that no compiled step can take: strings, objects, dates, foreign tensors.

    It looks at dtypes only, so a batch whose `signature` has passed once need not be checked again.

    Raises:
        TypeError: a leaf is not numeric; the message names it.
    """
    for name, leaf in named_leaves(batch):
        if not is_numeric(leaf):
            raise TypeError(not_numeric(name, leaf))


def is_numeric(leaf: Any) -> bool:
    """Says whether a leaf can enter a compiled step."""
    if isinstance(leaf, jax.Array):
        return True
    dtype = _shape_and_dtype(leaf)[1]
    # bfloat16 and its like have NumPy's kind "V", as raw bytes have: JAX tells them apart.
    return isinstance(dtype, np.dtype) and (dtype.kind in "biufc" or jnp.issubdtype(dtype, np.number))


def stays_on_host(leaf: Any) -> bool:
    """Says whether a leaf is of strings, bytes, objects or dates: nothing a step takes, and yet no mistake."""
    dtype = _shape_and_dtype(leaf)[1]
    return (
        isinstance(dtype, np.dtype) and dtype.kind in "OUSMm" and isinstance(leaf, np.ndarray | str | bytes)
    )


def not_numeric(name: str, leaf: Any) -> str:
    """Returns the message for a leaf that is not numeric."""
    dtype = _shape_and_dtype(leaf)[1]
    return (
        f"Leaf `{name}` is a {type(leaf).__name__} of dtype {dtype}. The leaves of a batch must be NumPy or "
        f"JAX arrays of booleans or numbers. Encode `{name}` as numbers, or leave it out."
    )


def pad(batch: Batch, rows: int, row: Batch | None = None) -> Batch:
    """Returns a batch of `rows` rows: `batch`, then copies of its last row, or of another.

    Real values keep labels in range and losses finite in the rows that are masked out.

    Args:
        batch: a tree of arrays `[batch, ...]`; 0-d leaves are returned as they are.
        rows: the number of rows wanted, at least the number there are.
        row: a batch of one row to pad with, None for the last of `batch`.

    Raises:
        ValueError: `batch` has no row, or more than `rows`.
    """
    real = batch_size_of(batch)
    if real == rows:
        return batch
    if not 0 < real < rows:
        raise ValueError(f"Can't pad a batch of {real} rows to {rows}: it must have 1 to {rows} rows.")
    return jax.tree.map(
        lambda leaf, one: _pad_leaf(leaf, one, rows - real), batch, batch if row is None else row
    )


def another_row(first: Batch, last: Batch) -> Batch:
    """Returns a batch of one row that is not that of `last`: that of `first`, or zeros where both are the same."""
    pairs = list(zip(jax.tree.leaves(first), jax.tree.leaves(last), strict=True))
    if all(np.array_equal(one, other) for one, other in pairs):
        return jax.tree.map(lambda leaf: _module(leaf).zeros_like(leaf), first)
    return first


def owned(batch: Batch) -> Batch:
    """Returns the batch with NumPy arrays in memory of their own, which nobody writes to.

    JAX reads host arrays while later lines of Python run: it takes those that lie at a multiple of 64 bytes as they
    are, and copies others of 100 KB and more in a thread.
    """
    leaves, structure = jax.tree.flatten(batch)
    return jax.tree.unflatten(
        structure, [_copied(leaf) if isinstance(leaf, np.ndarray) else leaf for leaf in leaves]
    )


def _copied(leaf: np.ndarray) -> np.ndarray:
    if leaf.nbytes < _WORTH_ALIGNING or leaf.dtype.hasobject:
        return np.array(leaf)
    memory = np.empty(leaf.nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    copy = np.ndarray(leaf.shape, leaf.dtype, memory, start)
    copy[...] = leaf
    return copy


def mask(rows: int, real: int) -> np.ndarray:
    """Returns bool `[rows]`, true for the first `real` rows."""
    return np.arange(rows) < real


def unpad(tree: PyTree, real: int) -> PyTree:
    """Returns `tree` with the first `real` rows of every leaf that has rows."""
    return jax.tree.map(lambda leaf: leaf[:real] if _shape_and_dtype(leaf)[0] else leaf, tree)


def _shape_and_dtype(leaf: Any) -> tuple[tuple[int, ...], Any]:
    try:
        return leaf.shape, leaf.dtype
    except AttributeError:
        array = np.asarray(leaf)
        return array.shape, array.dtype


def _module(leaf: Any) -> Any:
    return jnp if isinstance(leaf, jax.Array) else np


def _pad_leaf(leaf: Any, row: Any, extra: int) -> Any:
    shape = _shape_and_dtype(leaf)[0]
    if not shape:
        return leaf
    xp = _module(leaf)
    return xp.concatenate([leaf, xp.broadcast_to(row[-1:], (extra, *shape[1:]))])


def _sizes(batch: Batch) -> str:
    described = [f"`{name}` {list(_shape_and_dtype(leaf)[0])}" for name, leaf in named_leaves(batch)]
    return ", ".join(described) or "none"


_UNIT = (
    "A batch that is one unit, such as a graph or a mesh, is declared by batch_axis = None on the trainer."
)


def _unequal(batch: Batch) -> str:
    return (
        f"The leaves of a batch have different leading sizes: {_sizes(batch)}. Every leaf that is not 0-d "
        f"must have the examples along its first dimension. {_UNIT}"
    )


def _rowless(batch: Batch) -> str:
    return (
        f"A {type(batch).__name__} was given as a batch, and no leaf of it has a leading dimension; the "
        f"leaves are: {_sizes(batch)}. A batch is a tree of arrays with the examples along their first "
        f"dimension. {_UNIT}"
    )


class GlobalBatch(NamedTuple):
    """A batch whose rows are read when they are asked for.

    Attributes:
        size: rows of the whole batch.
        read: `read(start, stop)` returns these rows as a batch, leaves `[stop - start, ...]`.
        spec: `spec()` returns a tree with the shapes and dtypes of the whole batch, e.g. of
            `jax.ShapeDtypeStruct`s; leaves `[size, ...]`.
    """

    size: int
    read: Callable[[int, int], Batch]
    spec: Callable[[], Batch]


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    """Returns some rows of a batch; its 0-d leaves as they are."""
    return jax.tree.map(lambda leaf: leaf[start:stop] if np.ndim(leaf) else leaf, batch)


def as_global(batch: Batch) -> GlobalBatch:
    """Returns a batch that is in memory, all of it, as a `GlobalBatch`."""
    return GlobalBatch(batch_size_of(batch), lambda start, stop: rows_of(batch, start, stop), lambda: batch)


def spec_of(batch: Any) -> Any:
    """Returns `batch` with every `GlobalBatch` in it replaced by its `spec`; others as they are."""
    return jax.tree.map(
        lambda leaf: leaf.spec() if isinstance(leaf, GlobalBatch) else leaf,
        batch,
        is_leaf=lambda leaf: isinstance(leaf, GlobalBatch),
    )
