"""`Weighted`, losses with the weights under which they are averaged. Owns the pair; the step owns the quotient."""

from typing import Any

import flax.struct


@flax.struct.dataclass
class Weighted:
    """What `loss` may return in place of losses: the loss of a step is then a weighted mean over all of it.

    That is the sum of `losses * weights` over the sum of `weights`, both over all real rows of the step: of every
    micro-batch (`accumulate=`), device and process. The mean loss that is logged is the same quotient over its range
    of steps, or over an evaluation. Metrics get `loss` and `weight`, both `[batch]`: the quotient of each row, 0 where
    it has no weight, and the sum of its weights.

    The weights are constants to the gradient. A loss whose weight is 0 takes no part, also where it is NaN or
    infinite. A step whose weights sum to 0 leaves the state as it was, but for the step, which counts on.

    Attributes:
        losses: float `[batch, ...]`, e.g. one a token, pixel or label.
        weights: of the same shape, of any real dtype or bool, not negative.

    Example:
        >>> import jax.numpy as jnp
        >>> tokens = jnp.array([[5, 3, 0], [7, 0, 0]])
        >>> weighted = Weighted(jnp.ones((2, 3)), tokens != 0)
        >>> weighted.losses.shape == weighted.weights.shape
        True
    """

    losses: Any
    weights: Any
