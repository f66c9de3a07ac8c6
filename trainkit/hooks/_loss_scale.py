"""Dynamic loss scaling for float16. Owns the scale and its adjustment; the step multiplies, divides and skips."""

from typing import Any, Self

import clu.metrics
import flax.struct
import jax
import jax.numpy as jnp

from trainkit._core.state import TrainState
from trainkit._core.typing import PyTree
from trainkit.hooks._hook import StepHook

NAME = "loss_scale"
"""Key in `state.hooks`."""

_INITIAL, _GROWTH, _BACKOFF, _INTERVAL = 2.0**15, 2.0, 0.5, 2000


@flax.struct.dataclass
class LossScale:
    """Memory of the scale.

    It halves when a gradient is not finite, and doubles after 2000 updates in a row that were (Micikevicius et
    al. 2018, section 3.2).

    Attributes:
        scale: `float32[]`, what the loss is multiplied by.
        finite: `int32[]`, updates in a row with finite gradients.
        skipped: `int32[]`, updates skipped so far.
    """

    scale: jax.Array
    finite: jax.Array
    skipped: jax.Array


def loss_scale_hook() -> StepHook:
    """Returns the hook that keeps the scale in the state; the step itself updates it."""

    def init(state: TrainState) -> LossScale:
        zero = jnp.zeros((), jnp.int32)
        return LossScale(jnp.asarray(_INITIAL, jnp.float32), zero, jnp.copy(zero))

    return StepHook(NAME, init, lambda memory, values: memory)


@flax.struct.dataclass
class SkippedUpdates(clu.metrics.Metric):
    """The share of updates that were skipped.

    The outputs come once for each micro-batch of an update, and each is its part of that update.

    Attributes:
        skipped: `float32[]`, updates skipped.
        updates: `float32[]`, updates.
    """

    skipped: jax.Array
    updates: jax.Array

    @classmethod
    def empty(cls) -> Self:
        """Returns the metric of no updates."""
        return cls(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))  # pyright: ignore[reportCallIssue]

    @classmethod
    def from_model_output(cls, skipped_updates: jax.Array, part: jax.Array, **_: Any) -> Self:
        """Returns the metric of a micro-batch.

        Args:
            skipped_updates: `float32[]`, 1 where its update was skipped, else 0.
            part: `float32[]`, what part of its update it is.
        """
        return cls(skipped_updates * part, part)  # pyright: ignore[reportCallIssue]

    def merge(self, other: Self) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the metric of both."""
        return type(self)(self.skipped + other.skipped, self.updates + other.updates)  # pyright: ignore[reportCallIssue]

    def compute(self) -> Any:
        """Returns the share."""
        return self.skipped / self.updates


def all_finite(tree: PyTree) -> jax.Array:
    """Returns `bool[]`, whether every number in `tree` is finite."""
    leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return jnp.stack(leaves).all()


def adjusted(memory: LossScale, finite: jax.Array) -> LossScale:
    """Returns the memory after an update whose gradients were all finite, or not."""
    run = jnp.where(finite, memory.finite + 1, 0)
    grown = jnp.where(run >= _INTERVAL, memory.scale * _GROWTH, memory.scale)
    return LossScale(
        scale=jnp.where(finite, grown, jnp.maximum(memory.scale * _BACKOFF, 1.0)),
        finite=jnp.where(run >= _INTERVAL, 0, run),
        skipped=memory.skipped + (~finite).astype(jnp.int32),
    )
