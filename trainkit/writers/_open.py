"""The writers of a run: its default logs, and with the history and the user's own all that a fit writes to.

Owns which writers those are, their opening and closing.
"""

import contextlib
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence

import jax

from trainkit._core.history import History
from trainkit._core.typing import Clock
from trainkit.writers._jsonl import JsonlWriter
from trainkit.writers._multi import MultiWriter
from trainkit.writers._null import NullWriter
from trainkit.writers._tensorboard import TensorBoardWriter
from trainkit.writers._writer import MetricWriter, Scalar


def open_writer(
    logdir: str | os.PathLike[str], *, purge_step: int | None = None, clock: Clock = time.time
) -> MetricWriter:
    """Opens the default logs of a run: TensorBoard and JSONL in one folder.

    Args:
        logdir: the run's folder, local.
        purge_step: int; what the folder's logs hold from this step on is dropped. A run resumed after step n
            passes n + 1.
        clock: seconds since 1970.

    Returns:
        A writer to both, in which one that fails does not stop the other.

    Raises:
        OSError: the folder cannot be made or written to, or something else than a file lies under the name of a log.
        ValueError: the folder has a live writer in this process.

    Example:
        >>> import tempfile
        >>> writer = open_writer(tempfile.mkdtemp())
        >>> writer.write_scalars(1, {"train/loss": 0.5})
        >>> writer.close()
    """
    tensorboard = TensorBoardWriter(logdir, purge_step=purge_step, clock=clock)
    try:
        jsonl = JsonlWriter(logdir, purge_step=purge_step, clock=clock)
    except BaseException:
        tensorboard.close()
        raise
    return MultiWriter(tensorboard, jsonl)


class HistoryWriter(NullWriter):
    """Keeps scalars in a `History`."""

    def __init__(self, history: History) -> None:
        self._history = history

    def write_scalars(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        self._history.append(step, {name: float(value) for name, value in scalars.items()})


@contextlib.contextmanager
def open_writers(
    logdir: pathlib.Path | None, own: Sequence[MetricWriter], history: History
) -> Iterator[MetricWriter]:
    """Yields a writer to all of them; at the end closes what it opened and flushes the user's own.

    Of several processes the first writes; the others keep the history and nothing else.
    """
    if jax.process_index():
        logdir, own = None, ()
    opened = [] if logdir is None else [open_writer(logdir)]
    # The user's writers stay open for the next fit; they are only handed what this one writes.
    fan_out = MultiWriter(HistoryWriter(history), *opened, *own)
    with contextlib.ExitStack() as stack:
        # A stack, since an interrupt or a warning made an error in one must not leave the others open.
        for writer in opened:
            stack.callback(writer.close)
        stack.callback(fan_out.flush)
        yield fan_out
