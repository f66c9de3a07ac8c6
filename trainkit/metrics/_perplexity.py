"""Perplexity: the exponential of the mean loss per token.

Owns the token mask; losses are computed by the user.
"""

from typing import ClassVar, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics

from trainkit.metrics._inputs import broadcast_mask
from trainkit.metrics._variant import variant


@flax.struct.dataclass
class Perplexity(metrics.Metric):
    """The exponential of the mean negative log-likelihood (natural logarithm) per token.

    Every unmasked token weighs the same, whatever its sequence's length, so that the result doesn't depend on
    how examples are batched. Without any token the result is NaN. By default the losses are the output
    `loss`; where `loss` is one number per sequence, return the losses per token as an output of their own:

        return losses.mean(-1), {"token_losses": losses, "token_mask": tokens != 0}

    and annotate `Perplexity.from_outputs("token_losses", "token_mask")`.

    Args:
        total: float `[]`, sum of the losses.
        count: `[]`, int number of tokens, or the float sum of their weights.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainkit.metrics import Perplexity
        >>> float(Perplexity.from_model_output(loss=jnp.log(jnp.array([2.0, 8.0]))).compute())
        4.0
    """

    losses: ClassVar[str] = "loss"
    token_mask: ClassVar[str | None] = None
    weights: ClassVar[str | None] = None

    total: jax.Array
    count: jax.Array

    @classmethod
    def from_outputs(
        cls, losses: str, token_mask: str | None = None, weights: str | None = None
    ) -> type[Self]:
        """Returns the metric that reads other outputs.

        Args:
            losses: name of the output with the losses, float `[batch]` or `[batch, time]`.
            token_mask: name of the output with the mask over tokens, bool, of the losses' shape. A token
                counts if this mask and the example's `mask` both say so.
            weights: name of the output with weights of the losses, of their shape. The losses of a `tk.Weighted`
                loss have theirs without being told.

        Returns:
            A metric class for a collection's annotation.
        """
        return variant(cls, cls.__name__, losses=losses, token_mask=token_mask, weights=weights)

    @classmethod
    def empty(cls) -> Self:
        """Returns the metric of no tokens at all."""
        dtype = jnp.int32 if cls.weights is None else jnp.float32
        return cls(total=jnp.zeros((), jnp.float32), count=jnp.zeros((), dtype))

    @classmethod
    def from_model_output(cls, *, mask: jax.Array | None = None, **outputs: jax.Array) -> Self:
        """Returns the metric of one batch.

        Args:
            mask: bool `[batch]`.
            **outputs: the losses and, where one was named, the token mask.

        Returns:
            The sum of the losses and the number of tokens.
        """
        losses, keep = broadcast_mask(outputs[cls.losses], mask)
        if cls.token_mask is not None:
            keep &= broadcast_mask(losses, outputs[cls.token_mask])[1]
        losses = losses.astype(jnp.promote_types(losses.dtype, jnp.float32))
        if cls.weights is not None:
            weights = jnp.asarray(outputs[cls.weights]).astype(losses.dtype).reshape(losses.shape)
            keep &= weights != 0
            weights = jnp.where(keep, weights, 0)
            return cls(total=(jnp.where(keep, losses, 0) * weights).sum(), count=weights.sum())
        return cls(total=jnp.where(keep, losses, 0).sum(), count=keep.sum(dtype=jnp.int32))

    def merge(self, other: Self) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the sums over both sets of tokens; NumPy leaves stay NumPy."""
        return type(self)(total=self.total + other.total, count=self.count + other.count)

    def compute(self) -> jax.Array | np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the perplexity, float `[]`."""
        mean = self.total / self.count.astype(self.total.dtype)
        return jnp.exp(mean) if isinstance(mean, jax.Array) else np.exp(mean)
