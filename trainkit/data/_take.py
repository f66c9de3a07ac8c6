"""`take`: the first batches of a source. Owns the cut; the batches are the source's."""

import itertools
from collections.abc import Iterator
from typing import Any, final

from trainkit._core.typing import Batch
from trainkit.data._batch import GlobalBatch
from trainkit.data._source import Source, as_source


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
    whole = as_source(source)
    known = whole.steps_per_epoch
    return whole if known is not None and known <= n else _Taken(whole, n)


@final
class _Taken(Source):
    def __init__(self, source: Source, n: int) -> None:
        self._source, self._n = source, n
        # Of unknown length, it may have fewer than `n`.
        self.steps_per_epoch = None if source.steps_per_epoch is None else n
        self.batch_size, self.may_be_partial = source.batch_size, source.may_be_partial
        self.seekable = source.seekable

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        self.check_position(epoch, start)
        return itertools.islice(self._source.batches(epoch, start), max(self._n - start, 0))

    def global_batches(self, epoch: int, start: int = 0) -> Iterator[GlobalBatch]:
        self.check_position(epoch, start)
        return itertools.islice(self._source.global_batches(epoch, start), max(self._n - start, 0))
