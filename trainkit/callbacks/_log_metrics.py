"""`LogMetrics`: writes the metrics. Computes none; the windows they are over are the loop's."""

import logging
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from trainkit._core.cadence import Cadence, Every, as_cadence
from trainkit.callbacks._deferred import Deferred
from trainkit.callbacks._info import Info
from trainkit.writers._writer import MetricWriter

_LOGGER = logging.getLogger("trainkit")
_EVERY = Every(steps=50)


class LogMetrics(Deferred[tuple[int, Mapping[str, Any]]]):
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
        super().__init__()
        self.every = as_cadence(every, "every")
        self._last_step = 0
        self._left_out: set[str] = set()

    def on_fit_start(self, info: Info) -> None:
        super().on_fit_start(info)
        self._last_step = min(self._last_step, info.step)

    def on_eval_end(self, info: Info) -> None:
        assert self._writer is not None
        self._write_numbers(self._writer, info.step, info.metrics)

    def on_fit_end(self, info: Info) -> None:
        super().on_fit_end(info)
        if info.step > self._last_step:
            self.on_step(info)
            self._write_pending()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "last_step": self._last_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._last_step = state["last_step"]

    def _take(self, info: Info) -> tuple[int, Mapping[str, Any]]:
        self._last_step = info.step
        return info.epoch, info.metrics

    def _write(self, writer: MetricWriter, step: int, taken: tuple[int, Mapping[str, Any]]) -> None:
        epoch, metrics = taken
        if metrics:
            self._write_numbers(writer, step, {**metrics, "epoch": epoch})

    def _write_numbers(self, writer: MetricWriter, step: int, metrics: Mapping[str, Any]) -> None:
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
            writer.write_scalars(step, scalars)


def _is_number(value: Any) -> bool:
    array = np.asarray(value)
    return array.ndim == 0 and jnp.isdtype(array.dtype, ("bool", "integral", "real floating"))
