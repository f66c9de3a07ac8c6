"""The batches of one pass on their way into calls: looked at one ahead, taken one or many at a time.

Owns the look ahead; placing is the feed's.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from trainkit._feed.feed import Fed, Feed
from trainkit._feed.stream import Stream
from trainkit.data._arrays import RowNumbers
from trainkit.data._batch import check_batch, spec_of

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

    def __init__(self, numbers: RowNumbers, place: Callable[[Any], Fed], *, keeps: bool = False) -> None:
        self._numbers, self._place, self._keeps = numbers, place, keeps
        self.taken: Sequence[Any] = ()

    def more(self) -> bool:
        """Says whether there is another batch."""
        return len(self._numbers.head) > 0

    def mark(self, used: int) -> None:
        """As `Intake.mark`: a number of batches says it all."""

    def place(self, used: int) -> None:
        """As `Intake.place`."""

    def put_down(self, used: int) -> None:
        """As `Intake.put_down`."""

    def first(self) -> Fed:
        """Returns the next batch, and leaves it where it is."""
        return self._place(self._numbers.head)

    def take(self, most: int, together: Callable[[Fed], bool]) -> Sequence[Fed]:
        """Returns the next batches, as `Intake.take`."""
        first, count = self.first(), min(most, self._numbers.full)
        if count < 2 or not together(first):
            rows = next(self._numbers)
            self.taken = [rows] if self._keeps else ()
            return [first]
        rows = self._numbers.take(count)
        self.taken = list(rows) if self._keeps else ()
        return Block(rows, first.mask)


class Intake:
    """The batches of one pass on their way into a step, one of them looked at ahead.

    Args:
        batches: of the source.
        place: puts one on the devices; a tuple of several where `group` is above 1.
        group: how many make one step.
        keeps: whether `taken` is wanted.

    Attributes:
        taken: what the last `take` took, as it came: before it was padded and placed.
    """

    def __init__(
        self, batches: Iterator[Any], place: Callable[[Any], Fed], group: int = 1, *, keeps: bool = False
    ) -> None:
        self._batches, self._placing, self._group, self._keeps = batches, place, group, keeps
        self.taken: list[Any] = []
        self._sound = True
        self._ahead: Any = _UNREAD
        self._fed: Fed | None = None
        self._error: Exception | None = None

    def more(self) -> bool:
        """Says whether there is another batch; raises what the source raised, after all batches before it."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self._ahead is _UNREAD:
            self._sound = False
            if self._group == 1:
                self._ahead = next(self._batches, _END)
            else:
                self._ahead = tuple(itertools.islice(self._batches, self._group)) or _END
            self._sound = True
        return self._ahead is not _END

    def mark(self, used: int) -> None:
        """Notes where the source stands after `used` batches of the pass, where it can tell; before `more`."""
        if isinstance(self._batches, Stream):
            self._batches.mark(used)

    def place(self, used: int) -> dict[str, Any] | None:
        """Returns where the source stood after `used` batches, None where their number says it."""
        return self._batches.place(used) if isinstance(self._batches, Stream) else None

    def put_down(self, used: int) -> Stream | None:
        """Returns the source to be gone on with, what was looked at put back; None where it is to be opened anew.

        Args:
            used: batches of the pass used. Where others were taken too, a step that took them failed.
        """
        stream, ahead = self._batches, self._ahead
        if not isinstance(stream, Stream) or ahead is _END:
            return None
        if ahead is not _UNREAD:
            stream.put_back(*(ahead if self._group > 1 else (ahead,)))
            self._ahead = _UNREAD
        return stream if self._sound and stream.read == used else None

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
        self.taken = []
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
        if self._keeps:
            self.taken.append(self._ahead)
        self._ahead, self._fed = _UNREAD, None
        return fed

    def _placed(self, batch: Any) -> Fed:
        try:
            return self._placing(batch)
        except TypeError:
            check_batch(spec_of(batch))  # names the leaf that no step can take, where that was the reason
            raise


def intake_of(batches: Iterator[Any], feed: Feed, group: int, *, keeps: bool = False) -> Intake | RowIntake:
    """Returns the intake of a pass, `group` batches of which make one step; `keeps` where `taken` is wanted."""
    if group > 1:
        return Intake(batches, feed.place_group, group, keeps=keeps)
    if isinstance(batches, RowNumbers):
        return RowIntake(batches, feed.place, keeps=keeps)
    return Intake(batches, feed.place, keeps=keeps)
