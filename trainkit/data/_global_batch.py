"""One batch of several processes together, of which each reads the rows it needs. Owns no order of the data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from trainkit._typing import Batch
from trainkit.data._batch import batch_size_of


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


def as_global(batch: Batch) -> GlobalBatch:
    """Returns a batch that is in memory, all of it, as a `GlobalBatch`."""

    def read(start: int, stop: int) -> Batch:
        return jax.tree.map(lambda leaf: leaf[start:stop] if np.ndim(leaf) else leaf, batch)

    return GlobalBatch(batch_size_of(batch), read, lambda: batch)


def spec_of(batch: Any) -> Any:
    """Returns `batch` with every `GlobalBatch` in it replaced by its `spec`; others as they are."""
    return jax.tree.map(
        lambda leaf: leaf.spec() if isinstance(leaf, GlobalBatch) else leaf,
        batch,
        is_leaf=lambda leaf: isinstance(leaf, GlobalBatch),
    )
