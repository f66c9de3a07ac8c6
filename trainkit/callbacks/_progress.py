"""`Progress`: gathers how far a fit is and shows it. Computes no metric; its look is others'."""

import collections
import contextlib
import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

import jax
import numpy as np

from trainkit._core.cadence import Cadence, Every, as_cadence
from trainkit._core.typing import Clock
from trainkit.callbacks._callback import Callback
from trainkit.callbacks._info import Info
from trainkit.callbacks._progress_notebook import Notebook, in_notebook
from trainkit.callbacks._progress_view import Bar, Lines, Report

_LOGGER = logging.getLogger("trainkit")
_EVERY = Every(seconds=0.5)
_SPEED_SAMPLES = 20
# What a terminal that went away and a closed file raise; either ends the display and not the fit.
_LOST = (OSError, ValueError)


class Progress(Callback):
    """Shows epoch, step, speed, times and the newest metrics: a live bar on a terminal or in a notebook, else lines.

    Training metrics are shown one interval late, so that showing them never holds up the devices. Plain lines
    come at most every 10 seconds, at the end of an epoch at most every second, and once at the end. Only the
    first process shows anything.

    Args:
        every: cadence.
        stream: where to; None for the output of the cell in a notebook, else for `sys.stderr`.
        clock: returns seconds.

    Raises:
        TypeError: `every` is not a cadence.

    Example:
        >>> progress = Progress(every=Every(seconds=2))
    """

    def __init__(
        self,
        every: Cadence = _EVERY,
        *,
        stream: TextIO | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.every = as_cadence(every, "every")
        self._stream, self._clock = stream, clock
        self._view: Bar | Lines | Notebook | None = None
        self._begin(step=0)

    def on_fit_start(self, info: Info) -> None:
        self._begin(info.step)
        self.reads_epoch = bool(info.plan.eval_names)
        if jax.process_index() == 0:
            self._view = self._new_view()
        self._show(info, "starting")

    def on_epoch_start(self, info: Info) -> None:
        self._show(info, "" if info.step > self._first_step else "starting")

    def on_step(self, info: Info) -> None:
        self._samples.append((info.step, self._training_seconds()))
        # What was asked for last time is on the host by now; what is asked for now will be next time.
        self._keep(self._pending)
        self._pending = info.metrics
        self._show(info)

    def on_eval_start(self, info: Info) -> None:
        self._eval_started = self._clock()
        self._show(info, "evaluating")

    def on_eval_end(self, info: Info) -> None:
        self._eval_seconds += self._clock() - self._eval_started
        self._evaluated_at = info.step
        self._keep(info.metrics)
        self._show(info)

    def on_epoch_end(self, info: Info) -> None:
        if self._evaluated_at == info.step:
            # The evaluation has waited for the devices, so the epoch's own metrics cost no wait; they are the
            # ones to stand beside it.
            self._keep(info.metrics)
            self._pending = {}
        self._show(info, end_of_epoch=True)

    def on_fit_end(self, info: Info) -> None:
        self._keep(self._pending)
        self._keep(info.metrics)
        # The last word is the mean over the fit.
        self._samples.clear()
        self._samples += [(self._first_step, 0.0), (info.step, self._training_seconds())]
        self._show(info, final=True)

    def on_exception(self, info: Info, exc: BaseException) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the last picture on the screen, and the cursor as it was."""
        view, self._view, self._pending = self._view, None, {}
        if view is not None:
            with contextlib.suppress(*_LOST):
                view.close()

    def _begin(self, step: int) -> None:
        self._first_step, self._started = step, self._clock()
        self._evaluated_at: int | None = None
        self._eval_started = self._eval_seconds = 0.0
        self._samples: collections.deque[tuple[int, float]] = collections.deque(maxlen=_SPEED_SAMPLES)
        self._pending: Mapping[str, Any] = {}
        self._metrics: dict[str, dict[str, float]] = {}

    def _new_view(self) -> Bar | Lines | Notebook:
        if self._stream is None and in_notebook():
            return Notebook()
        stream = self._stream or sys.stderr
        return Bar(stream) if _is_terminal(stream) else Lines(stream)

    def _training_seconds(self) -> float:
        return self._clock() - self._started - self._eval_seconds

    def _keep(self, metrics: Mapping[str, Any]) -> None:
        """Makes the single numbers in `metrics` the newest of their sources."""
        for name, value in metrics.items():
            source, _, metric = name.partition("/")
            if np.ndim(value) == 0:
                self._metrics.setdefault(source, {})[metric] = float(value)

    def _show(
        self, info: Info, activity: str = "", *, end_of_epoch: bool = False, final: bool = False
    ) -> None:
        view = self._view
        if view is None:
            return
        report = Report(
            epoch=info.epoch,
            epochs=info.plan.epochs,
            step=info.step,
            steps=info.plan.steps,
            speed=self._speed(),
            elapsed=self._clock() - self._started,
            activity=activity,
            metrics=dict(sorted(self._metrics.items(), key=lambda item: item[0] != "train")),
            end_of_epoch=end_of_epoch,
            final=final,
        )
        try:
            view.show(report)
        except _LOST as error:
            self.close()
            _LOGGER.warning("Progress can't write any more and shows nothing from here on: %s", error)

    def _speed(self) -> float | None:
        """Returns updates a second of training, None while it is not known."""
        if len(self._samples) < 2:
            return None
        (step, seconds), (last_step, last_seconds) = self._samples[0], self._samples[-1]
        return (last_step - step) / (last_seconds - seconds) if last_seconds > seconds else None


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")
