"""A source whose batches are cut by another process. Owns that process; imports no JAX, so that it starts fast."""

import concurrent.futures
import multiprocessing
import os
import signal

import numpy as np


def cut(number, last):
    """Returns batch `number`; ends its own process where that is `last`."""
    if number == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return np.full(4, number, np.float32)


def batches(steps, last=None):
    """Yields batches read by a process, which is killed at the batch `last`."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for number in range(1, steps + 1):
            yield pool.submit(cut, number, last).result()
