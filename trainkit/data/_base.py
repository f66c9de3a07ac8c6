"""`Source`: what the loop needs of any data. Owns no data."""

import abc
from collections.abc import Iterator
from typing import Any, final

from trainkit._core.typing import Batch
from trainkit.data._batch import GlobalBatch, as_global, owned


class Source(abc.ABC):
    """Batches by epoch: what a trainer reads, whatever lies behind it.

    A source of one's own subclasses it, sets the attributes it knows, and defines `batches`.

    Attributes:
        steps_per_epoch: batches in an epoch; None when unknown or endless.
        num_examples: examples an epoch yields, over all its batches; None when unknown.
        batch_size: rows in a full batch; None when unknown.
        may_be_partial: whether some batch can be smaller than the others.
        seekable: whether `batches(epoch, start)` reaches `start` without reading what lies before it.
        keeps_batches: whether the arrays of a batch stay as they are once the next is asked for. False, the default,
            lets a source fill the same buffers again and again: batches are then copied as they come.
        endless: whether an epoch has no end.

    Example:
        >>> import numpy as np
        >>> class Noise(Source):
        ...     steps_per_epoch, batch_size, may_be_partial, seekable = 10, 32, False, True
        ...     def batches(self, epoch, start=0):
        ...         for index in range(start, 10):
        ...             yield np.random.default_rng([epoch, index]).normal(size=(32, 4))
        >>> len(list(Noise().batches(epoch=0, start=4)))
        6
    """

    steps_per_epoch: int | None = None
    num_examples: int | None = None
    batch_size: int | None = None
    may_be_partial: bool = True
    seekable: bool = False
    keeps_batches: bool = False
    endless: bool = False

    @abc.abstractmethod
    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Returns an iterator over the batches of an epoch from one of them on.

        Args:
            epoch: the number of the epoch, from 0.
            start: the index of the first batch wanted, from 0; what follows is what an iterator from 0 yields
                there.
        """

    def global_batches(self, epoch: int, start: int = 0) -> Iterator[GlobalBatch]:
        """Returns an iterator over the same batches, read in part: what several processes ask for.

        By default each process reads every batch whole and keeps its rows. A source that can read less, as
        `Arrays` does, overrides it; what its `read` returns nobody may write to.

        Args:
            epoch: as for `batches`.
            start: as for `batches`.
        """
        return map(as_global, self.kept_batches(epoch, start))

    @final
    def kept_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Returns an iterator over the same batches, each in memory that the source does not write to again.

        Args:
            epoch: as for `batches`.
            start: as for `batches`.
        """
        batches = iter(self.batches(epoch, start))
        return batches if self.keeps_batches else map(owned, batches)

    def in_order(self) -> "Source":
        """Returns the source as it is evaluated: every example once, in the order of the data; by default itself."""
        return self

    def facts(self) -> dict[str, Any]:
        """Returns what must be as it was for a run to go on inside an epoch: JSON by name, None where unknown."""
        return {name: getattr(self, name) for name in ("batch_size", "num_examples", "steps_per_epoch")}

    def position(self, batches: Iterator[Batch]) -> Any:
        """Returns where an iterator that `batches` or `batches_at` returned stands, for `batches_at`.

        By default None, and a run is resumed by the number of batches used. A source that can't seek and yet knows
        its position overrides both.

        Args:
            batches: the iterator; asked for before its next batch is read, and at its end.

        Returns:
            Dicts, lists and tuples of numbers, strings, bytes and arrays; None where there is nothing to go on from.
        """
        return None

    def batches_at(self, epoch: int, position: Any) -> Iterator[Batch]:
        """Returns an iterator over the batches of an epoch from a position on, without reading those before it.

        Args:
            epoch: the number of the epoch, from 0.
            position: what `position` returned.
        """
        raise NotImplementedError(f"{type(self).__name__} gives positions and must define batches_at.")

    def check_position(self, epoch: int, start: int) -> None:
        """Refuses a position that is negative or lies beyond the end of an epoch.

        Args:
            epoch: the number of the epoch, from 0.
            start: the index of a batch, from 0.

        Raises:
            ValueError: the position does not exist. `start == steps_per_epoch` does: no batch is left there.
        """
        if epoch < 0 or start < 0:
            raise ValueError(f"epoch and start count from 0, got epoch={epoch}, start={start}.")
        if self.steps_per_epoch is not None and start > self.steps_per_epoch:
            raise ValueError(
                f"start={start} lies beyond the {self.steps_per_epoch} batches of an epoch. A run is "
                "continued on the data it was started with."
            )
