"""SIGTERM and Ctrl-C during a fit: noted by a handler, read by the loop between steps, agreed on by all processes.

Owns the handlers and the exchange; not when processes meet, which is the loop's.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import numpy as np
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupts:
    """What the process was asked while a fit runs.

    Attributes:
        noted: name of the first signal this process got, e.g. `"SIGTERM"`, None before one came.
        received: the one to act on; of several processes, the one that all have agreed on.

    Args:
        alone: whether this process may act on a signal by itself.
    """

    def __init__(self, *, alone: bool = True) -> None:
        self.noted: str | None = None
        self.received: str | None = None
        self._alone = alone

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Installs the handlers in the main thread, and puts back what was there.

        A step takes the buffers of the state it is given, so an exception between two bytecodes could lose the
        state: the first signal is only noted. A second Ctrl-C raises KeyboardInterrupt at once.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # What is ignored, as by nohup, stays ignored; a handler set in C can't be put back.
        ours = [one for one in _SIGNALS if signal.getsignal(one) not in (signal.SIG_IGN, None)]
        before = {one: signal.signal(one, self._note) for one in ours}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.noted == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.noted = self.noted or signal.Signals(number).name
        if self._alone:
            self.received = self.noted


def agree(seconds: float, received: str | None) -> tuple[float, str | None]:
    """Returns the time of the first process and the signal of the first that has one; all must call.

    Args:
        seconds: since the fit began, on this process.
        received: name of the signal that this process got, None for none.
    """
    number = 0 if received is None else signal.Signals[received].value
    # As two words: a float64 would be rounded to float32 on its way.
    mine = np.array([*np.float64(seconds).reshape(1).view(np.uint32), number], np.uint32)
    everyone = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, mine.size)
    numbers = [int(number) for number in everyone[:, -1] if number]
    name = signal.Signals(numbers[0]).name if numbers else None
    return float(everyone[0, :2].copy().view(np.float64)[0]), name
