"""The batches of one pass over a source that can't seek: put down by one fit, and taken up by the next.

Owns what was read ahead, and where in the source that is; not when a fit begins or ends.
"""

import collections
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from trainkit._feed.leaves import Parted, Warned
from trainkit.data._base import Source
from trainkit.data._batch import owned


class Stream(Iterator[Any]):
    """The batches of one pass, of which some can be put back.

    Attributes:
        read: batches of the pass handed out and not put back.
        ended: whether the source has no more.

    Args:
        source: of the batches.
        epoch: the number of the pass, from 0.
        start: index of the first batch.
        place: what `place` returned in an earlier process, None to read up to `start`.
        in_parts: whether several processes read the batches in part.
        warned: of the trainer.
    """

    def __init__(
        self,
        source: Source,
        epoch: int,
        start: int = 0,
        place: Mapping[str, Any] | None = None,
        *,
        in_parts: bool = False,
        warned: Warned | None = None,
    ) -> None:
        self._source, self.read = source, start
        self._put_back: collections.deque[Any] = collections.deque()
        self._given: Iterator[Any] | None = None
        self._known: tuple[int, Any] | None = None
        self._end: Any = None
        self.ended = False
        if in_parts:
            self._batches = iter(source.global_batches(epoch, start))
            return
        if place is None:
            self._given = iter(source.batches(epoch, start))
        else:
            self._known = start - place["skip"], place["position"]
            self._end = place["position"] if not start else None
            self._given = iter(source.batches_at(epoch, place["position"]))
        batches = self._given if source.keeps_batches else map(owned, self._given)
        self._batches = Parted(batches, warned or Warned())
        if place is not None:
            collections.deque(itertools.islice(self._given, place["skip"]), maxlen=0)

    def __next__(self) -> Any:
        if self._put_back:
            batch = self._put_back.popleft()
        else:
            try:
                batch = next(self._batches)
            except StopIteration:
                self.ended, self._end = True, self._position()
                raise
        self.read += 1
        return batch

    def put_back(self, *batches: Any) -> None:
        """Takes the last batches read, in their order, to hand them out again."""
        self._put_back.extendleft(reversed(batches))
        self.read -= len(batches)

    def count_from(self, used: int) -> None:
        """Notes that the batch handed out next is number `used` of a pass."""
        if used != self.read:
            self.read, self._known = used, None

    def mark(self, used: int) -> None:
        """Notes where the source stands, which costs what the source makes it cost.

        Args:
            used: batches of the pass used; where more were read nothing is noted, and `place` goes by what was.
        """
        if self.read == used and not self._put_back:
            position = self._position()
            if position is not None:
                self._known = used, position

    def place(self, used: int) -> dict[str, Any] | None:
        """Returns where the source stood after `used` batches, None where that is known by their number alone."""
        if not used:
            return None if self._end is None else {"position": self._end, "skip": 0}
        if self._known is None:
            return None
        at, position = self._known
        return {"position": position, "skip": used - at}

    def _position(self) -> Any:
        return None if self._given is None else self._source.position(self._given)
