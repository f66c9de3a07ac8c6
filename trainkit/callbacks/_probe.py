"""`Probe`: writes what a function of the user finds in a step. Owns the names and the check of what it returns."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from trainkit._core.cadence import Cadence, Every, as_cadence
from trainkit._core.tree import begin_fetch, describe
from trainkit.callbacks._deferred import Deferred
from trainkit.callbacks._info import Info
from trainkit.hooks._hook import StepValues
from trainkit.hooks._probe import StepProbe
from trainkit.writers._writer import MetricWriter

_EVERY = Every(steps=50)


class Probe(Deferred[dict[str, jax.Array]]):
    """Writes what a function of your own finds inside a training step, one interval late so that the devices run on.

    The function is traced into a second program of the step, which runs where `every` is due and nowhere else: other
    steps cost what they cost without it. With a cadence in seconds, or in passes of unknown length, that is the step
    after the one at which it is due.

    Args:
        fn: `fn(values) -> scalar or mapping of names to scalars`, pure, of a `tk.hooks.StepValues`: `values.state` and
            `values.before`, the states after and before the step, hooks and refusals included; `values.loss`,
            `values.grads` as the optimizer got them, `values.updates`, `values.batch` and `values.mask`.
        every: cadence.
        name: name in the log, of a mapping before `/<key>`; that of the function by default.

    Raises:
        TypeError: `fn` is no function, or `every` not a cadence. At the start of a fit: it returns something else.
        ValueError: `fn` has no name, and none is given. At the start of a fit: it returns an array that is no scalar.

    Example:
        >>> import optax
        >>> def gradient_norm(values):
        ...     return optax.tree.norm(values.grads)
        >>> callbacks = [Probe(gradient_norm)]
    """

    def __init__(
        self, fn: Callable[[StepValues], Any], *, every: Cadence = _EVERY, name: str | None = None
    ) -> None:
        super().__init__()
        if not callable(fn):
            raise TypeError(f"Probe(fn={fn!r}): expected a function of tk.hooks.StepValues.")
        self.every = as_cadence(every, "every", comes=True)
        self._fn, self._name = fn, getattr(fn, "__name__", "") if name is None else name
        if not self._name or self._name == "<lambda>":
            raise ValueError("Probe(fn=...): a function without a name needs name=, that in the log.")

    def step_probe(self) -> StepProbe:
        return StepProbe(self._name, self._found)

    def _found(self, values: StepValues) -> dict[str, jax.Array]:
        result = self._fn(values)
        if not isinstance(result, Mapping):
            return {self._name: self._scalar(self._name, result)}
        named = {f"{self._name}/{key}": value for key, value in result.items()}
        return {name: self._scalar(name, value) for name, value in named.items()}

    def _scalar(self, name: str, value: Any) -> jax.Array:
        number = hasattr(value, "dtype") or isinstance(value, (bool, int, float))
        if not number or jnp.issubdtype(jnp.result_type(value), jnp.complexfloating):
            raise TypeError(
                f"the function of Probe({self._name!r}) returned {name} as {describe(value)}; it must return a real "
                "scalar, or a mapping of names to real scalars."
            )
        if jnp.shape(value):
            raise ValueError(
                f"the function of Probe({self._name!r}) returned {name} as {describe(value)}; it must be a scalar. "
                "Reduce it, e.g. by .mean(), or return a mapping with a name for each number."
            )
        return jnp.asarray(value)

    def _take(self, info: Info) -> dict[str, jax.Array]:
        begin_fetch(info.probed)
        return info.probed

    def _write(self, writer: MetricWriter, step: int, taken: dict[str, jax.Array]) -> None:
        writer.write_scalars(step, {name: float(value) for name, value in taken.items()})
