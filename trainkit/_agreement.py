"""What the processes of one fit must see alike: the time, and whether one of them was asked to stop.

Owns the exchange; not when it happens, which is the loop's.
"""

import signal

import numpy as np
from jax.experimental import multihost_utils


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
