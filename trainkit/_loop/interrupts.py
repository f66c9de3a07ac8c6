"""Signals during a fit: noted by a handler, read by the loop between steps, agreed on by all processes.

Owns the handlers and the exchange; not when processes meet, which is the loop's.
"""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import numpy as np
from jax.experimental import multihost_utils

_LOG = logging.getLogger("trainkit")
_SAVES = signal.SIGUSR1
# Ctrl-C is put back last: where it raises at once, all others have been.
_ENDS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
# What programs give a meaning of their own: where one has, it keeps it.
_FREE = (signal.SIGHUP, signal.SIGUSR1)


class Interrupts:
    """What the process was asked while a fit runs.

    Attributes:
        noted: name of the first signal to end this process got, e.g. `"SIGTERM"`, None before one came.
        received: the one to act on; of several processes, the one that all have agreed on.

    Args:
        alone: whether this process may act on a signal by itself.
    """

    def __init__(self, *, alone: bool = True) -> None:
        self.noted: str | None = None
        self.received: str | None = None
        self._alone, self._save_agreed = alone, False
        # The handler alone writes the first, the loop alone the second: so no signal is lost between two bytecodes.
        self._saves, self._saves_seen = 0, 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Installs the handlers in the main thread, and puts back what was there; elsewhere says that it can't.

        A step takes the buffers of the state it is given, so an exception between two bytecodes could lose the
        state: the first signal is only noted. A second Ctrl-C raises KeyboardInterrupt at once.
        """
        if threading.current_thread() is not threading.main_thread():
            _warn_of_thread()
            yield
            return
        before = {one: signal.signal(one, self._note) for one in (_SAVES, *_ENDS) if _is_ours(one)}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    @property
    def asked(self) -> bool:
        """Says whether there is anything to do when the running call ends."""
        return (
            self.received is not None
            or self._save_agreed
            or (self._alone and self._saves != self._saves_seen)
        )

    def take_save(self) -> bool:
        """Says whether to save, as SIGUSR1 asks, and forgets it: what comes from now on asks for another save."""
        if self._alone:
            return self._take_noted()
        agreed, self._save_agreed = self._save_agreed, False
        return agreed

    def agree(self, seconds: float) -> float:
        """Agrees with the other processes on what to act on, and returns the time of the first; all must call.

        Args:
            seconds: since the fit began, on this process.
        """
        number = 0 if self.noted is None else signal.Signals[self.noted].value
        # As two words: a float64 would be rounded to float32 on its way.
        mine = np.array(
            [*np.float64(seconds).reshape(1).view(np.uint32), number, self._take_noted()], np.uint32
        )
        everyone = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, mine.size)
        numbers = [int(number) for number in everyone[:, 2] if number]
        self.received = signal.Signals(numbers[0]).name if numbers else None
        self._save_agreed = self._save_agreed or bool(everyone[:, 3].any())
        return float(everyone[0, :2].copy().view(np.float64)[0])

    def _take_noted(self) -> bool:
        seen, self._saves_seen = self._saves_seen, self._saves
        return seen != self._saves_seen

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == _SAVES:
            self._saves += 1
            return
        if self.noted == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.noted = self.noted or signal.Signals(number).name
        if self._alone:
            self.received = self.noted


def _is_ours(one: signal.Signals) -> bool:
    """Says whether a fit may handle a signal: what is ignored, as by nohup, stays so; None was set in C."""
    handler = signal.getsignal(one)
    return handler is signal.SIG_DFL if one in _FREE else handler not in (signal.SIG_IGN, None)


_warned_of_thread = threading.Event()


def _warn_of_thread() -> None:
    if _warned_of_thread.is_set():
        return
    _warned_of_thread.set()
    _LOG.warning(
        "trainer.fit runs in the thread %r, and Python handles signals in the main thread only: SIGTERM, SIGHUP and "
        "Ctrl-C do not end this fit in order, SIGUSR1 does not save. Call fit in the main thread, or set handlers "
        "there and have a callback return tk.Stop(reason) or tk.Save() after one was called.",
        threading.current_thread().name,
    )
