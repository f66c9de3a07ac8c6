"""Accuracy with the label among the k best. Owns the rule for ties; k = 1 is `clu.metrics.Accuracy`."""

from typing import ClassVar, Self

import flax.struct
import jax
import jax.numpy as jnp
from clu import metrics

from trainkit.metrics._inputs import FromLogits
from trainkit.metrics._variant import variant


@flax.struct.dataclass
class TopKAccuracy(FromLogits, metrics.Average):  # pyright: ignore[reportIncompatibleMethodOverride]
    """The share of examples whose label is among the k highest logits; k = 5 unless `with_k` says otherwise.

    Equal logits are ranked by class index, the lower first, as `argmax` and `jax.lax.top_k` do: a label tied
    for the last place counts only if its index is low enough. A label outside of the classes, and a label
    whose logit is NaN, count as wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainkit.metrics import TopKAccuracy
        >>> top2 = TopKAccuracy.with_k(2)
        >>> logits = jnp.array([[0.1, 0.7, 0.2], [0.9, 0.1, 0.0]])
        >>> float(top2.from_model_output(logits=logits, labels=jnp.array([2, 2])).compute())
        0.5
    """

    k: ClassVar[int] = 5

    @classmethod
    def with_k(cls, k: int) -> type[Self]:
        """Returns the metric for another k.

        Args:
            k: how many of the highest logits to look at, at least 1.

        Returns:
            A metric class for a collection's annotation.

        Raises:
            ValueError: if k is smaller than 1.
        """
        if k < 1:
            raise ValueError(f"TopKAccuracy.with_k takes k >= 1, got {k}.")
        return variant(cls, f"Top{k}Accuracy", k=k)

    @classmethod
    def _check_classes(cls, logits: jax.Array) -> None:
        classes = logits.shape[-1]
        if cls.k > classes:
            raise ValueError(
                f"TopKAccuracy with k={cls.k} needs at least {cls.k} classes, the logits have {classes}. "
                f"Choose a smaller k: TopKAccuracy.with_k({classes})."
            )

    @classmethod
    def _of_batch(cls, logits: jax.Array, labels: jax.Array, mask: jax.Array | None) -> Self:
        classes = logits.shape[-1]
        index = jnp.arange(classes, dtype=jnp.int32).reshape((1,) * labels.ndim + (classes,))
        label = labels.astype(jnp.int32)[..., None]
        score = jnp.where(index == label, logits, 0).sum(axis=-1, keepdims=True)
        # "Not at most" rather than "greater": NaN logits rank first, as they do in argmax.
        ahead = ~(logits <= score) | ((logits == score) & (index < label))
        known = (labels >= 0) & (labels < classes)
        hit = known & (ahead.sum(axis=-1, dtype=jnp.int32) < cls.k)
        counts = super(FromLogits, cls).from_model_output(hit.astype(jnp.float32), mask=mask)
        return counts  # pyright: ignore[reportReturnType]
