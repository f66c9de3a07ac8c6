"""`SpikeGuard`: keeps updates far out of the usual from the state. The step itself refuses them; see the step hook."""

import math

import jax

from trainkit._core.cadence import Cadence, Every, as_cadence
from trainkit._core.tree import begin_fetch, copy_array
from trainkit.callbacks._deferred import Deferred
from trainkit.callbacks._info import Info
from trainkit.hooks._hook import StepHook
from trainkit.hooks._spike_guard import Of, spike_guard_hook
from trainkit.writers._writer import MetricWriter

_EVERY = Every(steps=50)
_OF = ("loss", "grad_norm")


class SpikeGuard(Deferred[jax.Array]):
    """Refuses an update whose loss, or norm of the gradient, is far above the usual, in the compiled step.

    Refused is what is strictly above `factor` times the median of the last `window` accepted values, once there are
    that many; the median of an even number is the mean of the two in the middle. Refused values do not enter the
    window. After `patience` refusals in a row the window starts afresh: what stays is a level, not a spike. A refused
    update counts as a step and leaves all else as it was, as one that `NanGuard` refuses.

    What is not finite never enters the window. NaN is above nothing and is left to `NanGuard`; infinity is above
    everything and is refused, but with `precision="float16"`, where it is the loss scale's affair.

    How many updates were refused so far is written as `spikes/refused` at the cadence, one interval late.

    Args:
        factor: above 0; values above it times the median are refused.
        window: int >= 1, accepted values looked at.
        of: "loss", or "grad_norm", the norm of the gradient that the optimizer would get.
        patience: int >= 1, refusals in a row after which the window starts afresh.
        every: cadence at which the count is written.
        name: key in `state.hooks`, and what comes before `/refused` in the log.

    Raises:
        TypeError: `every` is not a cadence.
        ValueError: an argument is out of range. At the start of a fit: `train_step` is overridden and does not tell
            what is asked for.

    Example:
        >>> callbacks = [SpikeGuard(factor=4.0, window=50, of="grad_norm")]
    """

    def __init__(
        self,
        factor: float = 10.0,
        window: int = 100,
        of: Of = "loss",
        *,
        patience: int = 50,
        every: Cadence = _EVERY,
        name: str = "spikes",
    ) -> None:
        super().__init__()
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
            raise ValueError(f"SpikeGuard(factor={factor!r}): must be a finite number above 0.")
        for argument, value in (("window", window), ("patience", patience)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"SpikeGuard({argument}={value!r}): must be an int of at least 1.")
        if of not in _OF:
            raise ValueError(f"SpikeGuard(of={of!r}): the choices are {', '.join(map(repr, _OF))}.")
        self.every = as_cadence(every, "every")
        self._factor, self._window, self._patience, self._name = float(factor), window, patience, name
        self._of: Of = of

    def step_hook(self) -> StepHook:
        return spike_guard_hook(
            self._name, factor=self._factor, window=self._window, of=self._of, patience=self._patience
        )

    def _take(self, info: Info) -> jax.Array:
        # Copied, because the next step takes the buffers of the state.
        record = copy_array(info.state.hooks[self._name].record)
        begin_fetch(record)
        return record

    def _write(self, writer: MetricWriter, step: int, taken: jax.Array) -> None:
        writer.write_scalars(step, {f"{self._name}/refused": float(taken[2])})
