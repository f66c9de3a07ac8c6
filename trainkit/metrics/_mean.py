"""Means of outputs, weighted or not, and the collection of several.

Owns the weighted sums, and what stands in for the mean of a weighted loss.
"""

from typing import Any, ClassVar, Self

import flax.struct
import jax
import jax.numpy as jnp
from clu import metrics

from trainkit.metrics._inputs import broadcast_mask, check_classification, output_name
from trainkit.metrics._perplexity import Perplexity
from trainkit.metrics._variant import variant

WEIGHT = "weight"
"""The output that holds the weights of a weighted loss, by row."""


@flax.struct.dataclass
class Mean(metrics.Average):
    """The mean of one output over all unmasked values, weighted where `from_output` names weights.

    Sums of values and of weights are accumulated and divided once, so the result doesn't depend on how examples are
    batched. Where a weight is 0 the value may be NaN. A scalar output counts once for every example of its batch.
    Without values, or without weight, the result is NaN.

    Of a loss that is `tk.Weighted` the mean of the output `loss` is weighted by itself.

    Args:
        total: float `[]`, sum of the values, each times its weight.
        count: `[]`, int number of values, or the float sum of their weights.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainkit.metrics import Mean
        >>> mean = Mean.from_output("error", weights="size")
        >>> float(mean.from_model_output(error=jnp.array([1.0, 5.0]), size=jnp.array([3.0, 1.0])).compute())
        2.0
    """

    output: ClassVar[str] = "loss"
    weights: ClassVar[str | None] = None

    total: jax.Array
    count: jax.Array

    @classmethod
    def from_output(cls, name: str, weights: str | None = None) -> type[Self]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the metric of an output.

        Args:
            name: of the output, real `[batch, ...]` or a scalar.
            weights: name of the output with its weights, of the same shape; `"weight"` for those of a `tk.Weighted`
                loss, summed by row. None gives every value the same.

        Returns:
            A metric class for a collection's annotation.
        """
        return variant(cls, cls.__name__, output=name, weights=weights)

    @classmethod
    def empty(cls) -> Self:
        """Returns the metric of no values at all."""
        total, count = nothing(cls.weights)
        return cls(total=total, count=count)

    @classmethod
    def from_model_output(cls, *, mask: jax.Array | None = None, **outputs: jax.Array) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the metric of one batch.

        Args:
            mask: bool `[batch]`.
            **outputs: the output and, where they were named, its weights.

        Returns:
            The sum of the values and that of the weights.

        Raises:
            ValueError: if the weights have another shape than the values.
        """
        total, count = weighted_sums(cls, outputs[cls.output], outputs, mask)
        return cls(total=total, count=count)

    def compute(self) -> Any:
        """Returns the mean, float `[]`."""
        return self.total / self.count.astype(self.total.dtype)


@flax.struct.dataclass
class Accuracy(metrics.Average):
    """The share of labels that have the highest logit, weighted where `with_weights` names weights.

    Reads `logits` `[batch, ..., classes]` and `labels` `[batch, ...]` of any integer dtype. A label outside of the
    classes counts as wrong.

    Args:
        total: float `[]`, number of hits, or the sum of their weights.
        count: `[]`, int number of labels, or the float sum of their weights.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainkit.metrics import Accuracy
        >>> accuracy = Accuracy.with_weights("token_weights")
        >>> logits, labels = jnp.array([[[1.0, 0.0], [0.0, 1.0]]]), jnp.array([[0, 0]])
        >>> batch = {"logits": logits, "labels": labels, "token_weights": jnp.array([[3.0, 1.0]])}
        >>> float(accuracy.from_model_output(**batch).compute())
        0.75
    """

    weights: ClassVar[str | None] = None

    total: jax.Array
    count: jax.Array

    @classmethod
    def with_weights(cls, weights: str) -> type[Self]:
        """Returns the metric in which labels have weights.

        Args:
            weights: name of the output with them, of the labels' shape.

        Returns:
            A metric class for a collection's annotation.
        """
        return variant(cls, cls.__name__, weights=weights)

    @classmethod
    def empty(cls) -> Self:
        """Returns the metric of no labels at all."""
        total, count = nothing(cls.weights)
        return cls(total=total, count=count)

    @classmethod
    def from_model_output(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, *, logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None, **outputs: jax.Array
    ) -> Self:
        """Returns the metric of one batch.

        Args:
            logits: float `[batch, ..., classes]`.
            labels: integer `[batch, ...]`.
            mask: bool `[batch]` or a longer leading part of the shape of `labels`.
            **outputs: the weights, where they were named.

        Returns:
            The weight of the hits and that of all labels.

        Raises:
            TypeError: if the labels are not integers.
            ValueError: if the shapes don't fit.
        """
        check_classification(logits, labels)
        hits = logits.argmax(axis=-1).astype(labels.dtype) == labels
        total, count = weighted_sums(cls, hits.astype(jnp.float32), outputs, mask)
        return cls(total=total, count=count)

    def compute(self) -> Any:
        """Returns the accuracy, float `[]`."""
        return self.total / self.count.astype(self.total.dtype)


def means(*names: str, weights: str | None = None) -> type[metrics.Collection]:
    """Returns a collection of the mean loss and the means of outputs, each under its own name.

    Args:
        *names: of outputs, as for `Mean.from_output`.
        weights: name of the output that weights them; the loss is weighted by itself.

    Returns:
        A collection for `Trainer.metrics`.

    Raises:
        ValueError: if a name is given twice.

    Example:
        >>> from trainkit.metrics import Accumulator, means
        >>> Accumulator(means("reconstruction", "kl")).names
        ('loss', 'reconstruction', 'kl')
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"means has the name {twice[0]!r} twice; give each output once.")
    of_outputs = {name: Mean.from_output(name, weights) for name in names if name != "loss"}
    return metrics.Collection.create(loss=Mean.from_output("loss"), **of_outputs)


def weighted_sums(
    metric: Any, values: jax.Array, outputs: dict[str, jax.Array], mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Returns the sums of the values and of their weights, or the number of values where they have none.

    Args:
        metric: a metric class with the name of its weights in `weights`.
        values: `[batch, ...]`, or a scalar that stands for every row.
        outputs: with the weights.
        mask: bool `[batch]`.
    """
    values = jnp.asarray(values)
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    if metric.weights is None:
        if values.ndim == 0 and mask is not None:
            values = jnp.broadcast_to(values, mask.shape)
        values, keep = broadcast_mask(values, mask)
        return jnp.where(keep, values, 0).sum(), keep.sum(dtype=jnp.int32)
    weights = jnp.asarray(outputs[metric.weights]).astype(values.dtype)
    values = jnp.broadcast_to(values, weights.shape) if values.ndim == 0 else values
    if weights.shape != values.shape:
        raise ValueError(
            f"the weights {metric.weights!r} have the shape {list(weights.shape)} and the values "
            f"{list(values.shape)}; both must have one shape. Return weights of that shape as an output of their own, "
            "e.g. {'token_weights': weights}, and name it"
        )
    weights, keep = broadcast_mask(weights, mask)
    keep &= weights != 0
    weights = jnp.where(keep, weights, 0)
    return (jnp.where(keep, values.reshape(keep.shape), 0) * weights).sum(), weights.sum()


def of_weighted_loss(name: str, metric: type[metrics.Metric]) -> type[metrics.Metric]:
    """Returns what stands in for `metric` where the loss is weighted: a mean of it must know of the weights.

    Args:
        name: of the metric in its collection.
        metric: as the collection has it.

    Raises:
        TypeError: it averages the loss in a way of its own.
    """
    if issubclass(metric, Mean):
        of_loss = metric.output == "loss" and metric.weights is None
        return metric.from_output("loss", WEIGHT) if of_loss else metric
    if issubclass(metric, Perplexity):
        of_loss = metric.losses == "loss" and metric.weights is None
        return metric.from_outputs("loss", metric.token_mask, WEIGHT) if of_loss else metric
    if output_name(metric) != "loss" or not issubclass(metric, (metrics.Average, metrics.LastValue)):
        return metric
    plain = ("merge", "compute", "empty", "reduce", "_reduce_merge")
    if issubclass(metric, metrics.Average) and all(_same(metric, metrics.Average, one) for one in plain):
        return Mean.from_output("loss", WEIGHT)
    raise TypeError(
        f"The metric {name!r} ({metric.__name__}) averages the output 'loss' over rows, and the loss is weighted "
        "(tk.Weighted). Use tk.metrics.Mean.from_output('loss', weights='weight'), or a subclass of tk.metrics.Mean."
    )


def is_weightless(metric: metrics.Metric) -> bool:
    """Says whether a metric that is weighted has seen no weight at all: it has no value then."""
    seen = getattr(metric, "count", getattr(metric, "weight", 1))
    return getattr(metric, "weights", None) is not None and not seen


def _same(metric: type, base: type, name: str) -> bool:
    one, other = getattr(metric, name), getattr(base, name)
    return getattr(one, "__func__", one) is getattr(other, "__func__", other)


def nothing(weights: str | None) -> tuple[jax.Array, jax.Array]:
    """Returns the sums over no values: of the values, and of their weights or their number."""
    return jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32 if weights is None else jnp.float32)
