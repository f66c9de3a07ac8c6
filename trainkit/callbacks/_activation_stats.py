"""`ActivationStats`: writes what the layers of a model return, in a few numbers. Owns when; the probe owns what."""

import logging

from trainkit._core.cadence import Cadence, Every, as_cadence
from trainkit._core.tree import begin_fetch
from trainkit.callbacks._deferred import Deferred
from trainkit.callbacks._info import Info
from trainkit.hooks._activations import activations_probe
from trainkit.hooks._numbers import Numbers
from trainkit.hooks._probe import StepProbe
from trainkit.writers._writer import MetricWriter

_LOGGER = logging.getLogger("trainkit")
_EVERY = Every(steps=50)


class ActivationStats(Deferred[Numbers]):
    """Writes for each layer, a module and what its `__call__` returned in the step, one interval late:

    - `activations/<layer path>/dead`: the share of units that are not above 0 for any example of the batch, so that
      relu makes them 0 everywhere; a unit is an index of the last axis, over all positions. Layers of Flax return what
      is before the nonlinearity, and so that is judged as relu would leave it; of a module that ends in relu it is the
      share of units that are 0.
    - `activations/<layer path>/saturated`: the share of outputs near a bound. Where all of a layer's outputs are in
      (0, 1], those of a sigmoid, that is below 0.01 or above 0.99; where all are in [-1, 1], those of tanh, above 0.99
      in magnitude; else they are read as going into tanh, and that is where `|tanh(output)|` is above 0.99.
    - `activations/<layer path>/mean` and `/std`: of all outputs.

    They are taken of one more forward pass of `loss` over the batches of the step, with the parameters before the
    update and the keys of the step, where `every` is due and nowhere else. Rows of padding do not count. Outputs that
    are no real floats `[batch, ...]` are left out, and so is the whole model, but where it has no other modules, as
    `(root)`. A model without any such layer is warned about once. The units of a module called several times are
    counted for each call. With a cadence in seconds, or in passes of unknown length, the step looked at is the one
    after.

    Args:
        every: cadence.
        name: of the probe.

    Raises:
        TypeError: `every` is not a cadence.
        ValueError: at the start of a fit: `train_step` is overridden.

    Example:
        >>> callbacks = [ActivationStats(every=Every(steps=200))]
    """

    def __init__(self, every: Cadence = _EVERY, *, name: str = "activations") -> None:
        super().__init__()
        self.every, self._name, self._said = as_cadence(every, "every", comes=True), name, False

    def step_probe(self) -> StepProbe:
        return activations_probe(self._name)

    def _take(self, info: Info) -> Numbers:
        begin_fetch(info.probed)
        return info.probed

    def _write(self, writer: MetricWriter, step: int, taken: Numbers) -> None:
        if taken.names:
            writer.write_scalars(step, taken.read())
        elif not self._said:
            _LOGGER.warning(
                "ActivationStats writes nothing: no module of the model returns real floats [batch, ...] from its "
                "__call__ in the loss."
            )
            self._said = True
