"""How the batches of a source get to the steps of a trainer. Owns no program."""

import functools
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from trainkit._core.tree import signature
from trainkit._feed.leaves import Parted, Warned, wide_leaves
from trainkit._feed.resident import NOTHING, Supply, can_hold
from trainkit._feed.stream import Stream
from trainkit._step.steps import Steps
from trainkit.data._arrays import Arrays
from trainkit.data._source import Source
from trainkit.parallel._strategy import Strategy


class Sources:
    """Opens sources for the steps of one trainer.

    Attributes:
        steps: of the trainer.
        strategy: of the trainer.
    """

    def __init__(self, steps: Steps, strategy: Strategy) -> None:
        self.steps, self.strategy = steps, strategy
        self._held_spec: dict[str, str] | None = None
        self._warned, self._looked_at = Warned(), weakref.WeakSet[Arrays]()

    def batches(self, source: Source, epoch: int, start: int = 0) -> Iterator[Any]:
        """Returns the batches of an epoch as a feed takes them: `GlobalBatch` where processes share the work."""
        if self.steps.units:
            return source.kept_batches(epoch, start)
        if self.strategy.processes == 1:
            batches = source.kept_batches(epoch, start)
            if not isinstance(source, Arrays) or not source.is_numeric:
                return Parted(batches, self._warned)
            if source not in self._looked_at:
                self._looked_at.add(source)
                leaves = jax.tree.leaves(source.tree)
                for name, index in wide_leaves(source.tree):
                    self._warned.check_wide(name, leaves[index])
            return batches
        return iter(source.global_batches(epoch, start))

    def open(
        self, source: Source, epoch: int, start: int = 0, place: Mapping[str, Any] | None = None
    ) -> Iterator[Any]:
        """Returns the batches of a pass to train on: a `Stream` where the source can't seek.

        Args:
            source: of the batches.
            epoch: the number of the pass, from 0.
            start: index of the first batch.
            place: see `Stream`.
        """
        if source.seekable:
            return self.batches(source, epoch, start)
        return Stream(source, epoch, start, place, in_parts=self.strategy.processes > 1, warned=self._warned)

    def supply(self, source: Source) -> Supply:
        """Says how the batches of a training source get to the step."""
        whole = Supply(NOTHING, functools.partial(self.open, source))
        arrays = can_hold(source, self.strategy)
        if arrays is None:
            return whole
        spec = signature(arrays.tree)
        # To hold data of another size is another program; the one for batches fits them all.
        self._held_spec = self._held_spec or spec
        return Supply(arrays.tree, arrays.row_numbers) if spec == self._held_spec else whole
