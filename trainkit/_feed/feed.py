"""From host batches to what a compiled step takes: checked, padded, masked, placed.

Owns the rule of padding; not the order of the data, which is the source's.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from trainkit._core.typing import Batch
from trainkit.data._batch import GlobalBatch, another_row, batch_size_of, mask, pad, rows_of
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
        announced: names of the steps of which that was said, to be said once for all feeds that share it.

    Attributes:
        on_padding: called with each batch that is about to be padded, where there is one.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        rows: int,
        may_be_partial: bool,
        exact: bool,
        what: str,
        why: str = "",
        announced: set[str] | None = None,
    ) -> None:
        if not rows:
            raise ValueError(no_rows(what))
        self._strategy, self._exact, self._what, self._why = strategy, exact, what, why
        self._rows = self._round_up(rows) if exact else rows
        masked = exact and (may_be_partial or self._rows != rows)
        self._full_mask = strategy.place(mask(self._rows, self._rows)) if masked else None
        self._announced = set() if announced is None else announced
        self.on_padding: Callable[[Any], None] | None = None

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
        if not real:
            raise ValueError(no_rows(self._what))
        if not self._exact:
            self._announce(real)
            return Fed(self._strategy.place(batch), None, real)
        self._tell(batch, real)
        return self._padded(batch, real)

    def twice(self, batch: Any) -> tuple[Fed, Fed]:
        """Returns a batch as `place` pads it, and the same rows padded with something else."""
        real = batch_size_of(batch)
        row = another_row(rows_of(batch, 0, 1), rows_of(batch, real - 1, real))
        return self._padded(batch, real), self._padded(batch, real, row)

    def _padded(self, batch: Any, real: int, row: Any = None) -> Fed:
        rows = max(self._rows, self._round_up(real))
        place: Callable[[Any], Any] = self._strategy.place
        return Fed(place(pad(batch, rows, row)), place(mask(rows, real)), real)

    def _tell(self, batch: Any, real: int) -> None:
        if self.on_padding is not None and real != max(self._rows, self._round_up(real)):
            self.on_padding(batch)

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
        if self._what not in self._announced:
            self._announced.add(self._what)
            _LOG.warning(
                "%s %s batch has %d examples, others %d: it is compiled at its own shape, because %s.",
                "an" if self._what[0] in "aeiou" else "a",
                self._what,
                real,
                self._rows,
                self._why,
            )


class UnitFeed(Feed):
    """Places batches that are one unit each: whole on each device, and never padded."""

    def __init__(self, strategy: Strategy) -> None:
        super().__init__(strategy, rows=1, may_be_partial=False, exact=False, what="")

    def place(self, batch: Any) -> Fed:
        """Returns `batch` on the devices, as one example."""
        placed = batch if self._strategy.takes_host_batches else self._strategy.replicate(batch)
        return Fed(placed, None, 1)


class SharedFeed(Feed):
    """Places the batches of several processes, each of which reads and pads the rows of its own devices."""

    def place(self, batch: GlobalBatch) -> Fed:
        """Returns `batch` on the devices of all processes; see `Feed.place` for the rule of padding."""
        real = batch.size
        if real != self._rows:
            if self._exact:
                self._tell(batch, real)
            else:
                self._announce(real)
        return self._padded(batch, real)

    def twice(self, batch: GlobalBatch) -> tuple[Fed, Fed]:
        """As `Feed.twice`."""
        row = another_row(batch.read(0, 1), batch.read(batch.size - 1, batch.size))
        return self._padded(batch, batch.size), self._padded(batch, batch.size, row)

    def _padded(self, batch: GlobalBatch, real: int, row: Any = None) -> Fed:
        rows = max(self._rows, self._round_up(real)) if self._exact else real
        own = self._strategy.own_rows(rows)
        stop = min(own.stop, real)
        # A process with nothing but padding reads one row to pad with.
        held = batch.read(min(own.start, stop - 1), stop)
        placed = self._strategy.place_own(pad(held, own.stop - own.start, row), rows)
        if real == self._rows or not self._exact:
            return Fed(placed, self._full_mask if real == self._rows else None, real)
        return Fed(placed, self._strategy.place(mask(rows, real)), real)


def no_rows(what: str) -> str:
    """Returns what is said of a batch without rows for a step."""
    return (
        f"a batch for {what} has 0 rows; a batch must have at least one. Where a filter can take all of them, "
        "pass over the batches it leaves empty."
    )
