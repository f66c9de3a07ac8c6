"""`StepContext`, what a loss is told about the step it runs in."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax


@flax.struct.dataclass
class StepContext:
    """What `loss` and `predict_step` are told about the step they run in. Frozen.

    Attributes:
        train: static `bool`; True in a training step, False in evaluation and prediction.
        step: `int32[]`, updates completed before this one.
        rng: typed PRNG key `[]`, unique to this step: `fold_in(state.rng, step)`. The module finds
            it behind every stream it asks for, as in `apply(rngs={name: rng})`.
        mask: `bool[batch]`, False for rows that only pad the batch; `bool[1]` where a batch is one unit.
        params: the parameters in their own dtype under any precision; `{}` at initialisation, when there are none.
        frozen: the arrays of `Trainer(frozen=)`, neither trained nor saved.
        hparams: the numbers of `Trainer(hparams=)`, each `float32[]`, nested as they were given.
    """

    train: bool = flax.struct.field(pytree_node=False)
    step: jax.Array
    rng: jax.Array
    mask: jax.Array
    params: Any = flax.struct.field(default_factory=dict)
    frozen: Mapping[str, Any] = flax.struct.field(default_factory=dict)
    hparams: Mapping[str, Any] = flax.struct.field(default_factory=dict)
