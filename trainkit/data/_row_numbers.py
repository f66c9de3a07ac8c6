"""Which examples make the batches of one pass. Owns the place in it; not the order, which is the source's."""

from collections.abc import Iterator
from typing import Self

import numpy as np


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
