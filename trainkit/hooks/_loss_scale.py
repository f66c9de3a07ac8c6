"""Dynamic loss scaling for float16. Owns the scale and its adjustment; the step multiplies, divides and skips."""

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
