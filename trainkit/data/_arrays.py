"""Batches out of arrays that fit in memory, or are mapped into it.

Owns the order of the examples and the seeking in it. Does not place batches on devices nor pad them.
"""

import copy
import operator
from collections.abc import Iterator
from typing import Any, Self, final

import jax
import jax.numpy as jnp
import numpy as np

from trainkit._core.tree import named_leaves
from trainkit._core.typing import Batch, PyTree
from trainkit.data._base import Source
from trainkit.data._batch import GlobalBatch, is_numeric, not_numeric, stays_on_host
from trainkit.data._tensors import to_host


class RowNumbers(Iterator[np.ndarray]):
    """An iterator over batches as the numbers of their examples, from which full batches can be taken together.

    Args:
        order: `int32[examples]`, the numbers in the order of the pass.
        rows: in a batch; the last may have fewer.

    Example:
        >>> numbers = RowNumbers(np.arange(8, dtype=np.int32), rows=3)
        >>> numbers.take(2).tolist(), [left.tolist() for left in numbers]
        ([[0, 1, 2], [3, 4, 5]], [[6, 7]])
    """

    def __init__(self, order: np.ndarray, rows: int) -> None:
        self._order, self._rows = order, rows

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> np.ndarray:
        if not len(self._order):
            raise StopIteration
        head, self._order = self.head, self._order[self._rows :]
        return head

    @property
    def head(self) -> np.ndarray:
        """The next batch, `int32[rows]`; empty after the last."""
        return self._order[: self._rows]

    @property
    def full(self) -> int:
        """The number of full batches that are left."""
        return len(self._order) // self._rows

    def take(self, batches: int) -> np.ndarray:
        """Returns the next `batches` full batches, `int32[batches, rows]`."""
        stop = batches * self._rows
        taken, self._order = self._order[:stop], self._order[stop:]
        return taken.reshape(batches, self._rows)


@final
class Arrays(Source):
    """A source of batches cut from arrays with a common leading dimension.

    The order of epoch e is a pure function of the seed, e and the number of examples. It is an order of
    examples, and batches are consecutive pieces of it, so it is the same for every batch size and on every
    host; of several processes, each reads the rows of its own devices only. Any batch of any epoch is reached
    directly. An unshuffled batch is a view: the arrays are not copied and must not change while in use.

    Args:
        arrays: a mapping, a tuple, a list, any nesting of these, or a single array; leaves `[examples, ...]`.
        batch_size: rows in a batch, over all hosts together.
        shuffle: draw a new order for every epoch.
        seed: non-negative; used when shuffling.
        drop_last: leave out the last batch of an epoch when it is smaller than `batch_size`. By default true
            when shuffled (the examples left out differ every epoch), false otherwise.
        on_device: put the arrays on the device at the start of a fit, where its step picks the rows of each batch,
            instead of handing every batch over. By default those of up to 64 MiB on a CPU and 1 GiB elsewhere. Only
            where a fit runs on one device; a trainer says in its `summary()` what it does.

    Attributes:
        size: the number of examples held.
        nbytes: of all arrays.
        on_device: as given.
        is_numeric: whether a step can take every leaf; strings and objects stay on the host.

    Raises:
        TypeError: no leaf is numeric.
        ValueError: the leading sizes differ, there is no example, labels are NaN, an option is out of range,
            or there is less than one batch and `drop_last` would leave it out.

    An evaluation or a prediction sees every example once and in the order of the arrays, whatever `shuffle` and
    `drop_last` are.

    Example:
        >>> import numpy as np
        >>> train = Arrays({"image": np.zeros((10, 8, 8)), "label": np.arange(10)}, batch_size=4)
        >>> [batch["label"].tolist() for batch in train.batches(epoch=0)]
        [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        >>> [batch["label"].tolist() for batch in train.batches(epoch=0, start=2)]
        [[8, 9]]
    """

    def __init__(
        self,
        arrays: PyTree,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool | None = None,
        on_device: bool | None = None,
    ) -> None:
        self.on_device = on_device
        tree = jax.tree.map(np.asarray, to_host(arrays))
        self.size = _check_leaves(tree)
        self._leaves, self._structure = jax.tree_util.tree_flatten(tree)
        self._shuffle = shuffle
        self._seed = _at_least("seed", seed, 0)
        self._drop_last = shuffle if drop_last is None else drop_last
        self._order_of: tuple[int, np.ndarray] | None = None
        self.nbytes = sum(leaf.nbytes for leaf in self._leaves)
        self.is_numeric = all(map(is_numeric, self._leaves))

        rows = _at_least("batch_size", batch_size, 1)
        if self._drop_last and self.size < rows:
            raise ValueError(_too_short(self.size, rows, drop_last))
        self._rows = self.batch_size = rows
        self.seekable = self.keeps_batches = True
        self._count()

    def _count(self) -> None:
        full, rest = divmod(self.size, self._rows)
        partial = rest > 0 and not self._drop_last
        self._steps = self.steps_per_epoch = full + partial
        self.num_examples = self.size if partial else full * self._rows
        self.may_be_partial = partial

    def __len__(self) -> int:
        """Returns the number of batches of an epoch."""
        return self._steps

    @property
    def tree(self) -> PyTree:
        """The arrays, NumPy leaves `[examples, ...]`."""
        return jax.tree_util.tree_unflatten(self._structure, self._leaves)

    def in_order(self) -> "Arrays":
        """Returns a source of the same arrays, neither shuffled nor shortened: what is evaluated and predicted."""
        if not (self._shuffle or self._drop_last):
            return self
        ordered = copy.copy(self)
        ordered._shuffle = ordered._drop_last = False
        ordered._count()
        return ordered

    def facts(self) -> dict[str, Any]:
        """Returns what settles the order of the examples, and which batch they are in."""
        order = {"shuffle": self._shuffle, "seed": self._seed, "drop_last": self._drop_last}
        return {**super().facts(), "examples": self.size, **order}

    def row_numbers(self, epoch: int, start: int = 0) -> RowNumbers:
        """Returns the same batches as the numbers of their examples."""
        self.check_position(epoch, start)
        order = self._order(epoch) if self._shuffle else np.arange(self.size)
        stop = self._steps * self._rows
        return RowNumbers(order[start * self._rows : stop].astype(np.int32), self._rows)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Returns an iterator over the batches of an epoch; those before `start` cost nothing.

        Args:
            epoch: the number of the epoch, from 0.
            start: the index of the first batch wanted.

        Raises:
            ValueError: a number is negative, or `start` lies beyond the epoch.
        """
        self.check_position(epoch, start)
        return self.pieces(epoch, self._rows, start)

    def pieces(self, epoch: int, rows: int, start: int = 0) -> Iterator[Batch]:
        """Returns an iterator over the examples in the batches of an epoch, in their order but `rows` at a time."""
        order = self._order(epoch) if self._shuffle else None
        stop = min(self._steps * self._rows, self.size)
        return (self._cut(order, first, min(first + rows, stop)) for first in range(start * rows, stop, rows))

    def _cut(self, order: np.ndarray | None, start: int, stop: int) -> Batch:
        rows = slice(start, stop)
        if order is None:
            leaves = [leaf[rows] for leaf in self._leaves]
        else:
            # `take` copies small rows two to three times faster than fancy indexing does.
            leaves = [leaf.take(order[rows], axis=0) for leaf in self._leaves]
        return jax.tree_util.tree_unflatten(self._structure, leaves)

    def global_batches(self, epoch: int, start: int = 0) -> Iterator[GlobalBatch]:
        """Returns an iterator over the same batches; what is not asked of them is not read."""
        self.check_position(epoch, start)
        order = self._order(epoch) if self._shuffle else None
        return (self._global_batch(order, index) for index in range(start, self._steps))

    def _global_batch(self, order: np.ndarray | None, index: int) -> GlobalBatch:
        first = index * self._rows
        size = min(self._rows, self.size - first)

        def read(start: int, stop: int) -> Batch:
            return self._cut(order, first + start, first + stop)

        def spec() -> Batch:
            leaves = [_spec(leaf, size) for leaf in self._leaves]
            return jax.tree_util.tree_unflatten(self._structure, leaves)

        return GlobalBatch(size, read, spec)

    def _order(self, epoch: int) -> np.ndarray:
        kept = self._order_of
        if kept is None or kept[0] != epoch:
            bits = np.random.Philox(np.random.SeedSequence([self._seed, epoch]))
            kept = self._order_of = (epoch, np.random.Generator(bits).permutation(self.size))
        return kept[1]


def _spec(leaf: np.ndarray, rows: int) -> Any:
    shape = (rows, *leaf.shape[1:])
    # JAX describes nothing that a step can't take; this takes no memory.
    return (
        jax.ShapeDtypeStruct(shape, leaf.dtype)
        if is_numeric(leaf)
        else np.broadcast_to(np.empty((), leaf.dtype), shape)
    )


def _check_leaves(tree: PyTree) -> int:
    named = named_leaves(tree)
    if not named:
        raise ValueError("Arrays was given no array. Give a mapping, a tuple or a list of arrays.")
    nothing = not any(is_numeric(leaf) for _, leaf in named)
    for name, leaf in named:
        if not is_numeric(leaf) and (nothing or not stays_on_host(leaf)):
            raise TypeError(not_numeric(name, leaf))
        if leaf.ndim == 0:
            raise ValueError(
                f"Leaf `{name}` of Arrays is 0-d. Every leaf must be an array with the "
                "examples along its first dimension; a list of numbers becomes one by np.asarray."
            )
        _check_labels(name, leaf)
    if len({len(leaf) for _, leaf in named}) > 1:
        sizes = ", ".join(f"`{name}` {len(leaf)}" for name, leaf in named)
        raise ValueError(f"The leaves of Arrays have different leading sizes: {sizes}. They must be equal.")
    if not len(named[0][1]):
        shapes = ", ".join(f"`{name}` {list(leaf.shape)}" for name, leaf in named)
        raise ValueError(f"Arrays was given no example: {shapes}. There must be at least one.")
    return len(named[0][1])


def _check_labels(name: str, leaf: np.ndarray) -> None:
    if "label" not in name.lower() or not jnp.issubdtype(leaf.dtype, np.inexact):
        return
    wrong = np.isnan(leaf)
    if wrong.any():
        raise ValueError(
            f"Leaf `{name}` of Arrays has {int(wrong.sum())} NaN among {leaf.size} values. Labels must be "
            "numbers: drop those examples, or give the labels a value and a weight of their own."
        )


def _at_least(name: str, value: Any, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}.") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}.")
    return number


def _too_short(size: int, rows: int, drop_last: bool | None) -> str:
    reason = "drop_last, true by default when shuffled," if drop_last is None else "drop_last=True"
    return (
        f"Arrays holds {size} examples, less than one batch of batch_size={rows}, and {reason} would leave "
        f"them out. Give a batch_size of at most {size}, or drop_last=False."
    )
