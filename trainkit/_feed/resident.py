"""Training data that lie on the device, from which the step picks the rows of its batch.

Owns when data are held there, and the picking; not the order of the rows, which is the source's.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from trainkit._core.typing import Batch, PyTree
from trainkit.data._arrays import Arrays
from trainkit.data._base import Source
from trainkit.data._batch import batch_size_of
from trainkit.parallel._strategy import Strategy

NOTHING: PyTree = ()
"""Held where batches are handed over whole."""

# On a CPU the device has no memory of its own, so that what is saved is the handing over alone.
_MOST_BYTES = {"cpu": 64 * 2**20}
_MOST_BYTES_ELSEWHERE = 2**30


class Supply(NamedTuple):
    """How the batches of a fit get to its step.

    Attributes:
        held: NumPy arrays `[examples, ...]` to be put on the device, `NOTHING` where batches are handed over whole.
        batches: `batches(epoch, start)`, what is handed over: `int32[rows]` numbers of rows where data are held.
    """

    held: PyTree
    batches: Callable[[int, int], Iterator[Any]]

    @property
    def holds(self) -> bool:
        """Whether data are held."""
        return bool(jax.tree.leaves(self.held))

    def like(self, batch: Batch) -> Any:
        """Returns something of the shape of what is handed over in place of `batch`."""
        return np.zeros((batch_size_of(batch),), np.int32) if self.holds else batch

    def read(self, handed: Any) -> Batch:
        """Returns the batch, or the tuple of batches, that `handed` stands for."""
        if not self.holds:
            return handed
        return jax.tree.map(
            lambda rows: jax.tree.map(lambda leaf: leaf.take(rows, axis=0), self.held), handed
        )


def can_hold(source: Source, strategy: Strategy) -> Arrays | None:
    """Returns `source` where it is to be held: it asks for it, or is small, and the step runs on one device."""
    # A subclass may do anything to its batches.
    if type(source) is not Arrays or not source.is_numeric or not strategy.takes_host_batches:
        return None
    most = _MOST_BYTES.get(jax.default_backend(), _MOST_BYTES_ELSEWHERE)
    wanted = source.nbytes <= most if source.on_device is None else source.on_device
    return source if wanted else None


def pick(held: PyTree, handed: Any) -> Batch:
    """Returns the rows of `held` that `handed` numbers, or `handed` itself where nothing is held; traced."""
    if not jax.tree.leaves(held):
        return handed

    def rows_of(rows: jax.Array) -> PyTree:
        return jax.tree.map(lambda leaf: leaf.at[rows].get(mode="promise_in_bounds"), held)

    return jax.tree.map(rows_of, handed)
