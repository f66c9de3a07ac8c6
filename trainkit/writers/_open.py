"""The default logs of a run. Owns which writers those are."""

import os
import time

from trainkit._typing import Clock
from trainkit.writers._jsonl import JsonlWriter
from trainkit.writers._multi import MultiWriter
from trainkit.writers._tensorboard import TensorBoardWriter
from trainkit.writers._writer import MetricWriter


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
        OSError: the folder cannot be made or written to.
        ValueError: the folder has a live writer in this process, or its JSONL file is damaged.

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
