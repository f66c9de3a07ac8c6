"""Reads batches ahead in a background thread.

Owns the thread and its shutdown. Does not decide where batches are placed: it is handed a function for that.
"""

import collections
import logging
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from types import TracebackType
from typing import Any, final

from trainkit._core.typing import Batch
from trainkit.data._batch import owned

_logger = logging.getLogger("trainkit")

_JOIN_SECONDS = 10.0


def prefetch(iterator: Iterable[Batch], size: int, place: Callable[[Batch], Any] | None = None) -> "Prefetch":
    """Returns an iterator over the same batches in the same order, up to `size` of them read ahead.

    Batches are copied, so that a source may fill the same buffers again. It pays where a batch costs real time to
    make; for batches cut from memory a thread costs more than it saves. An exception of the source is raised where
    its batch would have come. Close the result, or use it as a context manager; that ends the thread, as
    do the end of the batches and any exception.

    Args:
        iterator: the batches.
        size: how many batches may be held, at least 1.
        place: applied to each batch in the thread, for instance to transfer it. It must name its device or
            sharding, as JAX's context managers hold for one thread only.

    Raises:
        ValueError: `size` is less than 1.

    Example:
        >>> with prefetch(range(3), size=2, place=lambda batch: 10 * batch) as ahead:
        ...     list(ahead)
        [0, 10, 20]
    """
    if size < 1:
        raise ValueError(
            f"size must be at least 1, got {size}. Use the iterator itself to read nothing ahead."
        )
    return Prefetch(_Reader(iter(iterator), size, place))


@final
class Prefetch(Iterator[Any]):
    """The consumer's side of `prefetch`."""

    def __init__(self, reader: "_Reader") -> None:
        self._reader = reader
        self._thread = threading.Thread(target=reader.run, name="trainkit-prefetch", daemon=True)
        # The thread knows the reader only, so an iterator dropped without `close` is collected and ends it.
        weakref.finalize(self, reader.stop)
        try:
            self._thread.start()
        except BaseException:
            # A Ctrl-C can arrive while the thread is starting, before the caller holds anything to close.
            reader.stop()
            raise

    def __next__(self) -> Any:
        try:
            return self._reader.take()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread and drops what was read ahead; may be called again.

        It waits for the batch being made. A source that hangs is left behind after ten seconds, with a
        warning in the log.
        """
        self._reader.stop()
        self._thread.join(_JOIN_SECONDS)
        if self._thread.is_alive():
            _logger.warning(
                "The source is still busy %.0f s after prefetching was closed; its thread is left to itself.",
                _JOIN_SECONDS,
            )


@final
class _Reader:
    """The thread's side: reads while there is room, and ends by itself when stopped."""

    def __init__(self, iterator: Iterator[Batch], size: int, place: Callable[[Batch], Any] | None) -> None:
        self._iterator = iterator
        self._place = place
        self._size = size
        self._items: collections.deque[Any] = collections.deque()
        self._changed = threading.Condition()
        self._ended = False
        self._error: BaseException | None = None

    def run(self) -> None:
        error = None
        try:
            self._fill()
        except BaseException as caught:
            error = caught
        with self._changed:
            self._ended = True
            self._error = error
            self._changed.notify_all()

    def take(self) -> Any:
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._ended)
            if self._items:
                self._changed.notify_all()
                return self._items.popleft()
            error, self._error = self._error, None
        if error is not None:
            raise error
        raise StopIteration

    def stop(self) -> None:
        with self._changed:
            self._ended = True
            self._items.clear()
            self._changed.notify_all()

    def _fill(self) -> None:
        try:
            while self._room():
                # No name is bound to the batch: it would keep one more alive than `size`.
                try:
                    self._put(next(self._iterator))
                except StopIteration:
                    return
        finally:
            if isinstance(self._iterator, Generator):
                self._iterator.close()

    def _room(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._ended or len(self._items) < self._size)
            return not self._ended

    def _put(self, batch: Batch) -> None:
        # The source may fill the same buffers with the next batch, while this one waits or is on its way.
        batch = owned(batch)
        placed = batch if self._place is None else self._place(batch)
        with self._changed:
            if not self._ended:
                self._items.append(placed)
                self._changed.notify_all()
