"""What the pieces of a training step hand to one another. Owns no computation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from trainkit._core.state import TrainState
from trainkit._core.typing import Batch, PyTree
from trainkit._core.weighted import Weighted
from trainkit.hooks._hook import StepValues

Apply = Callable[[TrainState], TrainState]
"""An optimizer update with gradients already known, of the state it is given."""


Parts = tuple[tuple[Batch, jax.Array | None], ...]
"""The batches of one step with their masks: several where gradients are accumulated."""


class Pass(NamedTuple):
    """One pass forward and back over one batch of a step.

    Attributes:
        loss: `float32[]`, its share of the mean loss over the real examples of the step; its own where it is weighted.
        weight: `float32[]`, the sum of its weights; None where the losses have none.
        losses: `[batch]`, a scalar, or weighted.
        outputs: of the loss.
        updated: the collections it changed.
        grads: of `loss`.
        replaced: the collection that its own gradient replaces, `{}` where there is none.
    """

    loss: jax.Array
    weight: jax.Array | None
    losses: jax.Array | Weighted
    outputs: dict[str, Any]
    updated: dict[str, Any]
    grads: PyTree
    replaced: dict[str, Any]


@flax.struct.dataclass
class Share:
    """What one batch of several contributed to the gradient of a step, on this replica.

    Attributes:
        weight: `float32[]`, the sum of its weights; None where the losses have none.
        grads: its part of the sum that is the gradient, with the loss scale still in it.
    """

    weight: jax.Array | None
    grads: PyTree


@flax.struct.dataclass
class Updated:
    """One optimizer update.

    Attributes:
        state: after it.
        loss: `float32[]`, mean over the real examples; None where an overridden `train_step` gave none.
        weight: `float32[]`, the sum of the weights; None where the losses have none. Without weight nothing moves.
        grads: of `loss`; None where `train_step` is overridden.
        model_state: the collections after it; None where `train_step` is overridden.
        outputs: for the metrics, one mapping per batch of the step.
        per_example: whether the losses come one per example.
        shares: of the batches of the step, where there may be several.
    """

    state: TrainState
    loss: jax.Array | None
    weight: jax.Array | None
    grads: PyTree
    model_state: dict[str, Any] | None
    outputs: list[dict[str, Any]]
    per_example: bool = flax.struct.field(pytree_node=False)
    shares: list[Share] = flax.struct.field(default_factory=list)

    def told(self, before: TrainState) -> StepValues:
        """Returns what hooks are told of this update of `before`."""
        loss = jnp.asarray(jnp.nan) if self.loss is None else self.loss
        return StepValues(self.state, loss, self.grads, before, self.loss is not None)
