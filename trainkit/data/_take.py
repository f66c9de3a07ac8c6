"""`take`: the first batches of a source. Owns the cut; the batches are the source's."""

import itertools
from collections.abc import Iterator
from typing import Any, final

from trainkit._core.typing import Batch
from trainkit.data._base import Source
from trainkit.data._batch import GlobalBatch
from trainkit.data._source import as_source


def take(source: Any, n: int) -> Source:
    """Returns a source of the first `n` batches of every epoch of another, e.g. of an endless one.

    Args:
        source: any data that a trainer takes.
        n: int of at least 1; a source that has fewer is returned whole.

    Raises:
        TypeError: `source` is no source, or `n` no int.
        ValueError: `n` is less than 1.

    Example:
        >>> import itertools
        >>> import numpy as np
        >>> endless = lambda: (np.full(4, index) for index in itertools.count())
        >>> [int(batch[0]) for batch in take(endless, 3).batches(epoch=0)]
        [0, 1, 2]
    """
    if not isinstance(n, int) or isinstance(n, bool):
        raise TypeError(f"take(n={n!r}): expected an int, the number of batches of an epoch.")
    if n < 1:
        raise ValueError(f"take(n={n}): there must be at least one batch.")
    return _Taken(as_source(source), n)


@final
class _Taken(Source):
    def __init__(self, source: Source, n: int) -> None:
        self._source, self._n = source, n
        known = source.steps_per_epoch
        whole = known is not None and known <= n
        # Of unknown length, it may have fewer than `n`.
        self.steps_per_epoch = known if whole else n if known is not None or source.endless else None
        self.batch_size, self.may_be_partial = source.batch_size, source.may_be_partial
        self.seekable, self.keeps_batches = source.seekable, source.keeps_batches
        if whole:
            self.num_examples = source.num_examples

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        self.check_position(epoch, start)
        return _Cut(iter(self._source.batches(epoch, start)), self._n - start)

    def global_batches(self, epoch: int, start: int = 0) -> Iterator[GlobalBatch]:
        self.check_position(epoch, start)
        return itertools.islice(self._source.global_batches(epoch, start), max(self._n - start, 0))

    def in_order(self) -> Source:
        ordered = self._source.in_order()
        return self if ordered is self._source else _Taken(ordered, self._n)

    def facts(self) -> dict[str, Any]:
        return {**self._source.facts(), "take": self._n}

    def position(self, batches: Iterator[Batch]) -> Any:
        assert isinstance(batches, _Cut)
        position = self._source.position(batches.whole)
        # Where the whole goes on behind the cut, a new epoch begins afresh all the same.
        return None if position is None or not batches.left else {"of": position, "left": batches.left}

    def batches_at(self, epoch: int, position: Any) -> Iterator[Batch]:
        return _Cut(iter(self._source.batches_at(epoch, position["of"])), position["left"])


@final
class _Cut(Iterator[Any]):
    """The first `left` of `whole`."""

    def __init__(self, whole: Iterator[Any], left: int) -> None:
        self.whole, self.left = whole, left

    def __next__(self) -> Any:
        if self.left <= 0:
            raise StopIteration
        self.left -= 1
        return next(self.whole)
