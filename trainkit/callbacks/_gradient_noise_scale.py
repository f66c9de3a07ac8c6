"""`GradientNoiseScale`: writes how large a batch pays. Owns the smoothing; the estimates are the probe's."""

import math
from typing import Any

from trainkit._core.cadence import Cadence, Every, as_cadence
from trainkit._core.tree import begin_fetch
from trainkit.callbacks._deferred import Deferred
from trainkit.callbacks._info import Info
from trainkit.hooks._noise_scale import noise_scale_probe
from trainkit.hooks._numbers import Numbers
from trainkit.hooks._probe import StepProbe
from trainkit.writers._writer import MetricWriter

_EVERY = Every(steps=50)


class GradientNoiseScale(Deferred[Numbers]):
    """Writes the simple noise scale, tr(Sigma) / |G|^2 in examples (McCandlish et al. 2018): how large a batch pays.

    Batches much smaller average away noise that matters, much larger ones waste examples. Both terms are estimated
    without bias from gradients at two batch sizes of the same step (appendix A.1 there): with `accumulate` of 2 or more
    those of its batches, which it computes anyway, else those of the two halves of its batch, by one more pass forward
    and back where `every` is due. Each estimate is averaged over the steps at which it was due, and their quotient
    written as `gradient_noise_scale`, one interval late. Nothing is written as long as the average for |G|^2 is not
    above 0, as may be where noise is all there is.

    Examples are taken for independent: a layer that reduces over the batch, such as `nn.BatchNorm`, makes it inexact.
    With a cadence in seconds, or in passes of unknown length, the step looked at is the one after.

    Args:
        every: cadence at which a step is looked at.
        decay: of the averages, per step looked at; at least 0 and below 1.
        name: name in the log.

    Raises:
        TypeError: `every` is not a cadence.
        ValueError: `decay` is out of range. At the start of a fit: the loss is a scalar for the whole batch and
            `accumulate` is 1, or `train_step` is overridden.

    Example:
        >>> callbacks = [GradientNoiseScale(every=Every(steps=20))]
    """

    def __init__(
        self, every: Cadence = _EVERY, *, decay: float = 0.98, name: str = "gradient_noise_scale"
    ) -> None:
        super().__init__()
        self.every = as_cadence(every, "every", comes=True)
        if not isinstance(decay, (int, float)) or not 0 <= decay < 1:
            raise ValueError(f"GradientNoiseScale(decay={decay!r}): must be a number in [0, 1).")
        self._decay, self._name = decay, name
        self._square = self._noise = 0.0

    def step_probe(self) -> StepProbe:
        return noise_scale_probe(self._name)

    def _take(self, info: Info) -> Numbers:
        begin_fetch(info.probed)
        return info.probed

    def _write(self, writer: MetricWriter, step: int, taken: Numbers) -> None:
        found = taken.read()
        if all(map(math.isfinite, found.values())):
            # Both lack the same factor for having begun at 0, which their quotient does not have.
            self._square = self._decay * self._square + (1 - self._decay) * found["square"]
            self._noise = self._decay * self._noise + (1 - self._decay) * found["noise"]
        if self._square > 0:
            writer.write_scalars(step, {self._name: self._noise / self._square})

    def state_dict(self) -> dict[str, Any]:
        super().state_dict()  # writes what is pending, which counts
        return {"square": self._square, "noise": self._noise}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._square, self._noise = state["square"], state["noise"]
