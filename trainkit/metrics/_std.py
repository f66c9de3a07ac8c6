"""The standard deviation as a mergeable metric.

Owns the moments; the mean itself is `clu.metrics.Average`.
"""

from typing import Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics

from trainkit.metrics._inputs import broadcast_mask


@flax.struct.dataclass
class Std(metrics.Metric):
    """The population standard deviation of all unmasked values.

    Means and sums of squared deviations are merged rather than raw sums of squares, so that a spread much
    smaller than the mean isn't lost to cancellation (Chan, Golub and LeVeque 1983, "Algorithms for computing
    the sample variance"). The carried values are scalars; without any value the result is NaN.

    Args:
        count: int `[]`, number of values.
        mean: float `[]`, their mean, 0 without values.
        m2: float `[]`, the sum of squared deviations from the mean.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainkit.metrics import Std
        >>> spread = Std.from_output("loss")
        >>> float(spread.from_model_output(loss=jnp.array([1.0, 3.0])).compute())
        1.0
    """

    count: jax.Array
    mean: jax.Array
    m2: jax.Array

    @classmethod
    def empty(cls) -> Self:
        """Returns the metric of no values at all."""
        # One array in two fields could not be donated.
        mean, m2 = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)
        return cls(count=jnp.zeros((), jnp.int32), mean=mean, m2=m2)

    @classmethod
    def from_model_output(cls, values: jax.Array, mask: jax.Array | None = None, **_: object) -> Self:
        """Returns the metric of one batch.

        Args:
            values: `[batch, ...]` or a scalar, of any real dtype; accumulated in float32 at least.
            mask: bool `[batch]` or a longer leading part of the shape of `values`.

        Returns:
            The moments of the unmasked values.
        """
        values, mask = broadcast_mask(values, mask)
        values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
        count = mask.sum(dtype=jnp.int32)
        mean = jnp.where(mask, values, 0).sum() / jnp.maximum(count, 1).astype(values.dtype)
        m2 = jnp.where(mask, values - mean, 0) ** 2
        return cls(count=count, mean=mean, m2=m2.sum())

    def merge(self, other: Self) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the moments of both sets of values; NumPy leaves stay NumPy."""
        count = self.count + other.count
        # The share is exactly 0 or 1 when one side is empty, which makes `empty()` an exact identity.
        share = other.count / (count + (count == 0).astype(count.dtype))
        delta = other.mean - self.mean
        weight = self.count.astype(delta.dtype) * share
        return type(self)(
            count=count,
            mean=self.mean + delta * share,
            m2=self.m2 + other.m2 + delta**2 * weight,
        )

    def compute(self) -> jax.Array | np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the standard deviation, float `[]`."""
        return (self.m2 / self.count.astype(self.m2.dtype)) ** 0.5
