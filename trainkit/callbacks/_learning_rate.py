"""`LearningRate`: writes the learning rate in use. Changes nothing."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from trainkit._core.cadence import Cadence, Every, as_cadence
from trainkit._core.tree import begin_fetch, copy_array
from trainkit._core.typing import PyTree
from trainkit.callbacks._deferred import Deferred
from trainkit.callbacks._hyperparams import labels_of, missing, values_of
from trainkit.callbacks._info import Info
from trainkit.writers._writer import MetricWriter

_EVERY = Every(steps=50)


class LearningRate(Deferred[dict[str, jax.Array]]):
    """Writes the learning rate that the last update used, one interval late so that the devices run on.

    It is read from the optimizer state where `optax.inject_hyperparams` keeps it, else computed by
    `schedule` from the optimizer's own count of updates: one that was skipped, or waits in `optax.MultiSteps`, moves
    neither. Of several injected ones each is written as `<name>/<label>`, the label being that of
    `optax.partition`; of one that is an array each element as `<name>/<index>`.

    Args:
        every: cadence.
        name: name in the log.
        schedule: `schedule(count) -> rate`, given to the optimizer too; for an optimizer without
            injected hyperparameters. Its n-th update used `schedule(n - 1)`; where its state holds no count, n is
            the step.
        hyperparam: name of the injected hyperparameter.

    Raises:
        TypeError: `every` is not a cadence or `schedule` not a function.
        ValueError: at the start of a fit, where there is neither an injected hyperparameter nor a schedule.

    Example:
        >>> import optax
        >>> schedule = optax.cosine_decay_schedule(1e-3, decay_steps=1000)
        >>> callbacks = [LearningRate(schedule=schedule)]
    """

    def __init__(
        self,
        every: Cadence = _EVERY,
        *,
        name: str = "learning_rate",
        schedule: optax.Schedule | None = None,
        hyperparam: str = "learning_rate",
    ) -> None:
        super().__init__()
        self.every = as_cadence(every, "every")
        if schedule is not None and not callable(schedule):
            raise TypeError(
                f"LearningRate(schedule={schedule!r}): expected a function of the count of updates."
            )
        self._name, self._schedule, self._hyperparam = name, schedule, hyperparam
        self._rate: Callable[[Any], jax.Array] | None = None
        self._late = False
        self._names: list[str] = []

    def on_fit_start(self, info: Info) -> None:
        labels = labels_of(info.state.opt_state, self._hyperparam)
        if not labels and self._schedule is None:
            why = missing("LearningRate", info.state.opt_state, self._hyperparam)
            raise ValueError(f"{why}; or pass the schedule, LearningRate(schedule=...).")
        self._names = [f"{self._name}/{label}" if label else self._name for label in labels]
        if self._schedule is not None:
            self._rate, self._late = _compiled(self._schedule)
        super().on_fit_start(info)

    def _take(self, info: Info) -> dict[str, jax.Array]:
        if self._names:
            values = values_of(info.state.opt_state, self._hyperparam)
            # Copied, because the next step takes the buffers of the state.
            rates = {name: copy_array(value) for name, value in zip(self._names, values, strict=True)}
        else:
            assert self._rate is not None
            count = _updates(info.state.opt_state)
            count = np.int32(info.step) if count is None else count
            rates = {self._name: copy_array(count) if self._late else self._rate(count)}
        begin_fetch(rates)
        return rates

    def _write(self, writer: MetricWriter, step: int, taken: dict[str, jax.Array]) -> None:
        if self._late and not self._names:
            assert self._rate is not None
            taken = {name: self._rate(count) for name, count in taken.items()}
        scalars: dict[str, float] = {}
        for name, value in taken.items():
            for index, element in np.ndenumerate(np.asarray(value)):
                scalars["/".join([name, *map(str, index)])] = float(element)
        writer.write_scalars(step, scalars)


def _updates(opt_state: PyTree) -> Any:
    """Returns how many updates the schedule of an optimizer has made, `int32[]`; None where its state has no count."""
    for wanted in (_is_of_schedule, _counts):
        counts = [node.count for node in jax.tree.leaves(opt_state, is_leaf=wanted) if wanted(node)]
        if counts:
            # Groups that were frozen for a while lag behind.
            return functools.reduce(jnp.maximum, counts)
    return None


def _is_of_schedule(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)


def _counts(node: Any) -> bool:
    if not (isinstance(node, tuple) and "count" in getattr(node, "_fields", ())):
        return False
    count: Any = node.count  # pyright: ignore[reportAttributeAccessIssue]
    return hasattr(count, "dtype") and count.ndim == 0 and jnp.issubdtype(count.dtype, jnp.integer)


def _compiled(schedule: optax.Schedule) -> tuple[Callable[[Any], jax.Array], bool]:
    """Returns the rate of the last of a number of updates, and whether it is plain Python, which can't be compiled."""

    def rate(count: Any) -> jax.Array:
        return jnp.asarray(schedule(jnp.maximum(count - 1, 0)))

    compiled = jax.jit(rate)
    try:
        jax.eval_shape(compiled, np.int32(0))
    except Exception:
        return lambda count: jnp.asarray(schedule(max(int(count) - 1, 0))), True
    return compiled, False
