"""`Deferred`: values that are read one interval after they were taken, so that no device is waited for.

Owns when they are written at the latest. What they are, and under which names, is the subclass's affair.
"""

import abc
from typing import Any, Generic, TypeVar

from trainkit.callbacks._callback import Callback
from trainkit.callbacks._info import Info
from trainkit.writers._writer import MetricWriter

Taken = TypeVar("Taken")
"""What is kept of a step until it is written."""


class Deferred(Callback, abc.ABC, Generic[Taken]):
    """Takes values at its cadence and writes them when the next are due.

    At the latest they are written before an evaluation, before a checkpoint, so that a run resumed there leaves no gap
    in the log, and when the fit ends in whatever way.

    Example:
        >>> class LogNorm(Deferred):
        ...     def _take(self, info):
        ...         return info.metrics
        ...     def _write(self, writer, step, taken):
        ...         writer.write_scalars(step, {"norm": float(taken["train/norm"])})
    """

    def __init__(self) -> None:
        self._writer: MetricWriter | None = None
        self._pending: tuple[int, Taken] | None = None

    @abc.abstractmethod
    def _take(self, info: Info) -> Taken:
        """Returns what is to be written of this step. It must not wait, and must own its arrays."""

    @abc.abstractmethod
    def _write(self, writer: MetricWriter, step: int, taken: Taken) -> None:
        """Writes what was taken at `step`; may wait for the devices."""

    def on_fit_start(self, info: Info) -> None:
        self._writer, self._pending = info.writer, None

    def on_step(self, info: Info) -> None:
        self._write_pending()
        self._pending = info.step, self._take(info)

    def on_eval_start(self, info: Info) -> None:
        self._write_pending()

    def on_fit_end(self, info: Info) -> None:
        self._write_pending()

    def on_exception(self, info: Info, exc: BaseException) -> None:
        self._write_pending()

    def close(self) -> None:
        self._writer = self._pending = None

    def state_dict(self) -> dict[str, Any]:
        """Writes what is pending, so that a run resumed from here leaves no gap in the log."""
        self._write_pending()
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._pending = None

    def _write_pending(self) -> None:
        if self._pending is None:
            return
        # Forgotten first: where reading raises, `on_exception` must not run into the same again.
        (step, taken), self._pending = self._pending, None
        assert self._writer is not None
        self._write(self._writer, step, taken)
