"""Sources of batches that are one unit each, such as a graph, without rows. Owns that view alone."""

from collections.abc import Iterator
from typing import Any

from trainkit._core.typing import Batch
from trainkit.data._base import Source
from trainkit.data._batch import GlobalBatch


class Units(Source):
    """The batches of another source, each of which is one unit: an epoch has as many examples as batches."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.steps_per_epoch = self.num_examples = source.steps_per_epoch
        self.seekable = source.seekable
        self.batch_size, self.may_be_partial = 1, False
        self.keeps_batches, self.endless = source.keeps_batches, source.endless

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        return self._source.batches(epoch, start)

    def position(self, batches: Iterator[Batch]) -> Any:
        return self._source.position(batches)

    def batches_at(self, epoch: int, position: Any) -> Iterator[Batch]:
        return self._source.batches_at(epoch, position)

    def in_order(self) -> Source:
        return Units(self._source.in_order())

    def global_batches(self, epoch: int, start: int = 0) -> Iterator[GlobalBatch]:
        def whole(batch: Batch) -> GlobalBatch:
            return GlobalBatch(1, lambda start, stop: batch, lambda: batch)

        return map(whole, self.batches(epoch, start))
