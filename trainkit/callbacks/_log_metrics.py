"""`LogMetrics`: writes the metrics. Computes none; the windows they are over are the loop's."""

import logging
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from trainkit._core.cadence import Cadence, Every, as_cadence
from trainkit.callbacks._callback import Callback
from trainkit.callbacks._info import Info
from trainkit.writers._writer import MetricWriter

_LOGGER = logging.getLogger("trainkit")
_EVERY = Every(steps=50)


class LogMetrics(Callback):
    """Writes `train/...` and `epoch` at its cadence, and `<eval-name>/...` after each evaluation.

    A training value is the exact mean over the steps since the last one written. To let the devices run
    on, it is written one interval late, at the latest before an evaluation, a checkpoint or the end of the
    fit, which also writes the steps left over. Metrics that are not single numbers are left out, and said
    so once.

    Args:
        every: cadence of the training metrics.

    Raises:
        TypeError: `every` is not a cadence.

    Example:
        >>> log = LogMetrics(every=Every(steps=100))
    """

    def __init__(self, every: Cadence = _EVERY) -> None:
        self.every = as_cadence(every, "every")
        self._writer: MetricWriter | None = None
        self._pending: tuple[int, int, Mapping[str, Any]] | None = None
        self._last_step = 0
        self._left_out: set[str] = set()

    def on_fit_start(self, info: Info) -> None:
        self._writer, self._pending = info.writer, None
        self._last_step = min(self._last_step, info.step)

    def on_step(self, info: Info) -> None:
        self._write_pending()
        self._take(info)

    def on_eval_start(self, info: Info) -> None:
        self._write_pending()

    def on_eval_end(self, info: Info) -> None:
        self._write(info.step, info.metrics)

    def on_fit_end(self, info: Info) -> None:
        self._write_pending()
        if info.step > self._last_step:
            self._take(info)
            self._write_pending()

    def on_exception(self, info: Info, exc: BaseException) -> None:
        self._write_pending()

    def close(self) -> None:
        self._writer = self._pending = None

    def state_dict(self) -> dict[str, Any]:
        """Writes what is pending, so that a run resumed from here leaves no gap in the log."""
        self._write_pending()
        return {"last_step": self._last_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last_step, self._pending = state["last_step"], None

    def _take(self, info: Info) -> None:
        self._pending = info.step, info.epoch, info.metrics
        self._last_step = info.step

    def _write_pending(self) -> None:
        if self._pending is None:
            return
        # Forgotten first: where reading raises, `on_exception` must not run into the same again.
        (step, epoch, metrics), self._pending = self._pending, None
        if metrics:
            self._write(step, {**metrics, "epoch": epoch})

    def _write(self, step: int, metrics: Mapping[str, Any]) -> None:
        assert self._writer is not None
        scalars = {name: float(value) for name, value in metrics.items() if _is_number(value)}
        for name in metrics.keys() - scalars.keys() - self._left_out:
            self._left_out.add(name)
            _LOGGER.warning(
                "%s is not a single number (its shape is %s) and is left out of the log; "
                "a callback can write it from info.metrics.",
                name,
                np.shape(metrics[name]),
            )
        if scalars:
            self._writer.write_scalars(step, scalars)


def _is_number(value: Any) -> bool:
    array = np.asarray(value)
    return array.ndim == 0 and jnp.isdtype(array.dtype, ("bool", "integral", "real floating"))
