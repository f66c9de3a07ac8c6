"""What metrics are given: which output, and the checking and broadcasting of masks, labels and logits.

Owns nothing but these rules. What a metric does with the values is the metric's own affair.
"""

import abc
from typing import Self

import jax
import jax.numpy as jnp
from clu import metrics


def broadcast_mask(values: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Returns `values` with at least one axis, and a mask of the same shape.

    Args:
        values: array `[batch, ...]`, or a scalar, which is taken as a batch of one.
        mask: `[batch]`, or any leading part of the shape of `values`; None means that every value counts.

    Returns:
        The values and a bool mask of their shape.

    Raises:
        ValueError: if the mask's shape is not the leading part of the shape of `values`.
    """
    values = jnp.asarray(values)
    if values.ndim == 0:
        values = values[None]
    if mask is None:
        return values, jnp.ones(values.shape, bool)
    mask = jnp.asarray(mask).astype(bool)
    if mask.shape != values.shape[: mask.ndim]:
        raise ValueError(
            f"A mask must have the leading shape of the values: got a mask of shape {mask.shape} for values "
            f"of shape {values.shape}. Allowed are [batch] and every longer leading part of the values' "
            "shape."
        )
    mask = mask.reshape(mask.shape + (1,) * (values.ndim - mask.ndim))
    return values, jnp.broadcast_to(mask, values.shape)


def check_classification(logits: jax.Array, labels: jax.Array) -> None:
    """Refuses labels that are not class indices for the logits.

    Args:
        logits: float `[..., classes]`.
        labels: integer `[...]`.

    Raises:
        TypeError: if the labels are not integers.
        ValueError: if the labels' shape is not that of the logits without the last axis.
    """
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"Labels must be class indices of an integer dtype, got {labels.dtype}{list(labels.shape)}. "
            "Cast them with labels.astype(jnp.int32)."
        )
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"Labels must have the logits' shape without the last axis: got labels {list(labels.shape)} and "
            f"logits {list(logits.shape)}. Turn one-hot labels into indices with labels.argmax(-1)."
        )


def output_name(metric: type[metrics.Metric]) -> str | None:
    """Returns the name given to `from_output`, or None for a metric made in another way."""
    method = metric.from_model_output.__func__
    if method.__module__ != "clu.metrics" or not method.__qualname__.startswith("Metric.from_output."):
        return None
    try:
        # CLU keeps the name in a closure; the missing key is the one place that tells it.
        metric.from_model_output()
    except KeyError as error:
        return error.args[0]
    return None


class FromLogits(abc.ABC):
    """Makes a metric of logits and labels: checks them, then hands them to `_of_batch`. Before CLU's class in bases."""

    @classmethod
    def from_model_output(
        cls, *, logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None, **_: object
    ) -> Self:
        """Returns the metric of one batch.

        Args:
            logits: float `[batch, ..., classes]`.
            labels: integer `[batch, ...]`.
            mask: bool `[batch]` or a longer leading part of the shape of `labels`.

        Returns:
            The metric of the unmasked labels.

        Raises:
            TypeError: if the labels are not integers, or the metric must be told the number of classes and was not.
            ValueError: if the shapes don't fit each other, or the number of classes does not fit the metric.
        """
        check_classification(logits, labels)
        cls._check_classes(logits)
        return cls._of_batch(logits, labels, mask)

    @classmethod
    @abc.abstractmethod
    def _check_classes(cls, logits: jax.Array) -> None:
        """Refuses a number of classes that does not fit the metric."""

    @classmethod
    @abc.abstractmethod
    def _of_batch(cls, logits: jax.Array, labels: jax.Array, mask: jax.Array | None) -> Self:
        """Returns the metric of one batch that was checked."""
