"""From host batches to what a compiled step takes: checked, padded, masked, placed.

Owns the rule of padding, and the look ahead at the next batch; not the order of the data, which is the source's.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from trainkit._typing import Batch
from trainkit.data._batch import batch_size_of, check_batch, mask, pad
from trainkit.data._global_batch import GlobalBatch, spec_of
from trainkit.data._row_numbers import RowNumbers
from trainkit.parallel._strategy import Strategy

_LOG = logging.getLogger("trainkit")


class Fed(NamedTuple):
    """One batch on the devices.

    Attributes:
        batch: leaves `[rows, ...]`.
        mask: `bool[rows]`, None when every row is real and none ever pads.
        real: number of real rows.
        batches: host batches in it: several, in a tuple, where gradients are accumulated.
    """

    batch: Batch
    mask: Any
    real: int
    batches: int = 1


class Feed:
    """Places the batches of one source for one compiled step.

    Where the loss comes one per example, a smaller batch is padded to the rows of the first and masked, so the
    step compiles once. Else it runs at its own shape, which is announced once.

    Args:
        strategy: where to place.
        rows: rows of the first batch.
        may_be_partial: whether a smaller batch may come.
        exact: whether masked rows leave the step exact.
        what: name of the step in messages, e.g. "training".
        why: why padding is not exact, for the announcement.
    """

    def __init__(
        self, strategy: Strategy, *, rows: int, may_be_partial: bool, exact: bool, what: str, why: str = ""
    ) -> None:
        self._strategy, self._exact, self._what, self._why = strategy, exact, what, why
        self._rows = self._round_up(rows) if exact else rows
        masked = exact and (may_be_partial or self._rows != rows)
        self._full_mask = strategy.place(mask(self._rows, self._rows)) if masked else None
        self._announced = False

    @property
    def in_flight(self) -> int | None:
        """Calls that may be dispatched ahead of the devices; None where the backend limits itself."""
        return self._strategy.in_flight

    def place(self, batch: Any) -> Fed:
        """Returns `batch` on the devices.

        Raises:
            ValueError: its leaves disagree in their leading dimension; the message names each.
        """
        real = batch_size_of(batch)
        if real == self._rows:
            return Fed(self._strategy.place(batch), self._full_mask, real)
        if not self._exact:
            self._announce(real)
            return Fed(self._strategy.place(batch), None, real)
        rows = max(self._rows, self._round_up(real))
        place: Callable[[Any], Any] = self._strategy.place
        return Fed(place(pad(batch, rows)), place(mask(rows, real)), real)

    def place_group(self, group: tuple[Any, ...]) -> Fed:
        """Returns the batches of one update on the devices, as tuples."""
        fed = [self.place(batch) for batch in group]
        return Fed(
            tuple(one.batch for one in fed),
            tuple(one.mask for one in fed),
            sum(one.real for one in fed),
            len(fed),
        )

    def _round_up(self, rows: int) -> int:
        shards = self._strategy.shards
        return -(-rows // shards) * shards

    def _announce(self, real: int) -> None:
        if not self._announced:
            self._announced = True
            _LOG.warning(
                "a %s batch has %d examples, others %d: it is compiled at its own shape, because %s.",
                self._what,
                real,
                self._rows,
                self._why,
            )


class SharedFeed(Feed):
    """Places the batches of several processes, each of which reads and pads the rows of its own devices."""

    def place(self, batch: GlobalBatch) -> Fed:
        """Returns `batch` on the devices of all processes; see `Feed.place` for the rule of padding."""
        real = batch.size
        rows = max(self._rows, self._round_up(real)) if self._exact else real
        if real != self._rows and not self._exact:
            self._announce(real)
        own = self._strategy.own_rows(rows)
        stop = min(own.stop, real)
        # A process with nothing but padding reads one row to pad with.
        held = batch.read(min(own.start, stop - 1), stop)
        placed = self._strategy.place_own(pad(held, own.stop - own.start), rows)
        if real == self._rows or not self._exact:
            return Fed(placed, self._full_mask if real == self._rows else None, real)
        return Fed(placed, self._strategy.place(mask(rows, real)), real)


_END, _UNREAD = object(), object()


class Block(Sequence[Fed]):
    """Full batches of held data, which come as one array.

    Attributes:
        rows: `int32[batches, rows]`.

    Args:
        rows: as above.
        mask: of each batch.
    """

    def __init__(self, rows: np.ndarray, mask: Any) -> None:
        self.rows, self._mask = rows, mask

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return Fed(self.rows[index], self._mask, self.rows.shape[1])

    def stacked(self, size: int) -> tuple[np.ndarray, Any]:
        """Returns the batches and their masks with `size` in front; what is beyond those there are is never read."""
        rows = self.rows
        if len(rows) < size:
            rows = np.empty((size, rows.shape[1]), rows.dtype)
            rows[: len(self.rows)] = self.rows
        return rows, None if self._mask is None else np.broadcast_to(self._mask, (size, *self._mask.shape))


class RowIntake:
    """As `Intake`, for data that are held: full batches are taken many at a time, at the price of one."""

    def __init__(self, numbers: RowNumbers, place: Callable[[Any], Fed]) -> None:
        self._numbers, self._place = numbers, place

    def more(self) -> bool:
        """Says whether there is another batch."""
        return len(self._numbers.head) > 0

    def first(self) -> Fed:
        """Returns the next batch, and leaves it where it is."""
        return self._place(self._numbers.head)

    def take(self, most: int, together: Callable[[Fed], bool]) -> Sequence[Fed]:
        """Returns the next batches, as `Intake.take`."""
        first, count = self.first(), min(most, self._numbers.full)
        if count < 2 or not together(first):
            next(self._numbers)
            return [first]
        return Block(self._numbers.take(count), first.mask)


class Intake:
    """The batches of one pass on their way into a step, one of them looked at ahead.

    Args:
        batches: of the source.
        place: puts one on the devices.
    """

    def __init__(self, batches: Iterator[Any], place: Callable[[Any], Fed]) -> None:
        self._batches, self._place = batches, place
        self._ahead: Any = _UNREAD
        self._fed: Fed | None = None
        self._error: Exception | None = None

    def more(self) -> bool:
        """Says whether there is another batch; raises what the source raised, after all batches before it."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self._ahead is _UNREAD:
            self._ahead = next(self._batches, _END)
        return self._ahead is not _END

    def first(self) -> Fed:
        """Returns the next batch, and leaves it where it is."""
        if self._fed is None:
            self._fed = self._placed(self._ahead)
        return self._fed

    def take(self, most: int, together: Callable[[Fed], bool]) -> Sequence[Fed]:
        """Returns the next batches, up to `most`; `more` has said that there is one.

        Args:
            most: at least 1.
            together: says whether a batch can share a call with others; else it comes by itself.
        """
        feds = [self._next()]
        if most == 1 or not together(feds[0]):
            return feds
        try:
            while len(feds) < most and self.more() and together(self.first()):
                feds.append(self._next())
        except Exception as error:
            # The steps before it are done first, as they would be one by one.
            self._error = error
        return feds

    def _next(self) -> Fed:
        fed = self.first()
        self._ahead, self._fed = _UNREAD, None
        return fed

    def _placed(self, batch: Any) -> Fed:
        try:
            return self._place(batch)
        except TypeError:
            check_batch(spec_of(batch))  # names the leaf that no step can take, where that was the reason
            raise
