"""The writers of a run: its default logs, and with the history and the user's own all that a fit writes to.

Owns which writers those are, their opening and closing.
"""

import contextlib
import os
import pathlib
import time
from collections.abc import Collection, Iterator, Mapping, Sequence

import jax

from trainkit._core.history import History
from trainkit._core.typing import Clock
from trainkit.writers._jsonl import JsonlWriter
from trainkit.writers._multi import MultiWriter
from trainkit.writers._null import NullWriter
from trainkit.writers._tensorboard import TensorBoardWriter
from trainkit.writers._writer import MetricWriter, Scalar

NO_CHARTS = ("epoch",)
"""Scalars of a fit that TensorBoard does not show: an axis of the data, which would stand first among its charts."""


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
    return _open(logdir, purge_step, clock)


def _open(
    logdir: str | os.PathLike[str],
    purge_step: int | None = None,
    clock: Clock = time.time,
    without: Collection[str] = (),
) -> MetricWriter:
    tensorboard = TensorBoardWriter(logdir, purge_step=purge_step, clock=clock, without=without)
    try:
        jsonl = JsonlWriter(logdir, purge_step=purge_step, clock=clock)
    except BaseException:
        tensorboard.close()
        raise
    return MultiWriter(tensorboard, jsonl)


class FitWriter(MultiWriter):
    """All that a fit writes to.

    Attributes:
        logs: those in the folder of the run alone, None where it has none.

    Args:
        history: of the run.
        logs: as above.
        own: the user's writers.
    """

    def __init__(self, history: History, logs: MetricWriter | None, own: Sequence[MetricWriter]) -> None:
        self.logs = logs
        super().__init__(HistoryWriter(history), *([] if logs is None else [logs]), *own)


class HistoryWriter(NullWriter):
    """Keeps scalars in a `History`."""

    def __init__(self, history: History) -> None:
        self._history = history

    def write_scalars(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        self._history.append(step, {name: float(value) for name, value in scalars.items()})


@contextlib.contextmanager
def open_writers(
    logdir: pathlib.Path | None, own: Sequence[MetricWriter], history: History
) -> Iterator[FitWriter]:
    """Yields a writer to all of them; at the end closes what it opened and flushes the user's own.

    Of several processes the first writes; the others keep the history and nothing else.
    """
    if jax.process_index():
        logdir, own = None, ()
    logs = None if logdir is None else _open(logdir, without=NO_CHARTS)
    # The user's writers stay open for the next fit; they are only handed what this one writes.
    fan_out = FitWriter(history, logs, own)
    with contextlib.ExitStack() as stack:
        # A stack, since an interrupt or a warning made an error in one must not leave the others open.
        if logs is not None:
            stack.callback(logs.close)
        stack.callback(fan_out.flush)
        yield fan_out
