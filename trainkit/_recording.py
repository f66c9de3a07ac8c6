"""The writers of one fit: the history, the logs of `logdir`, and the user's own. Owns their opening and closing."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import jax

from trainkit._history import History
from trainkit.writers._multi import MultiWriter
from trainkit.writers._null import NullWriter
from trainkit.writers._open import open_writer
from trainkit.writers._writer import MetricWriter, Scalar


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
