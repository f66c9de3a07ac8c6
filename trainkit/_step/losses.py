"""What the losses of a batch come to: its share in the loss of a step, and what metrics are told.

Owns that arithmetic; not how the losses were computed, nor what follows from them.
"""

from typing import Any

import jax
import jax.numpy as jnp

from trainkit._core.typing import Outputs, PyTree
from trainkit._core.weighted import Weighted


def mean_share(losses: jax.Array, mask: jax.Array | None, rows: int, examples: jax.Array | None) -> jax.Array:
    """Returns the share of these losses in the mean over `examples`; the mean itself where that is None.

    Args:
        losses: `[rows]` or a scalar, which is taken for the mean of its rows.
        mask: `bool[rows]`, None where all are real.
        rows: of the batch.
        examples: real rows of the whole step.
    """
    if examples is not None:
        count = rows if losses.ndim == 0 else 1
        kept = losses if mask is None or losses.ndim == 0 else jnp.where(mask, losses, 0)
        return kept.sum() * count / examples.astype(losses.dtype)
    if losses.ndim == 0:
        return losses
    if mask is None:
        return losses.mean()
    return jnp.where(mask, losses, 0).sum() / jnp.maximum(mask.sum(), 1).astype(losses.dtype)


def quotient(weighted: Weighted, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Returns the weighted mean of one batch, 0 without weight, and the sum of its weights; both `float32[]`."""
    losses, weights = _terms(weighted, mask)
    total = weights.sum()
    return (losses * weights).sum() / _not_zero(total), total


def of_all(weights: jax.Array, total: jax.Array, tree: PyTree) -> PyTree:
    """Returns what belongs to the quotient of one batch as its part of that of the whole step.

    Args:
        weights: sum of the weights of the batch.
        total: that of the step.
        tree: the quotient of the batch, and its gradient.
    """
    part = weights / _not_zero(total)
    return jax.tree.map(lambda leaf: leaf * part.astype(leaf.dtype), tree)


def for_metrics(
    losses: jax.Array | Weighted, outputs: Outputs, mask: jax.Array | None, rows: int | None
) -> dict[str, Any]:
    """Returns what the metrics of a batch are given.

    Args:
        losses: of the batch.
        outputs: of the loss.
        mask: `bool[rows]`, None where all are real.
        rows: of the batch, None where it is one unit.

    Returns:
        The outputs, with `loss` and `mask`, and the `weight` of weighted losses, all `[rows]`. Of a unit loss and
        weight are as they are, without a mask.
    """
    if rows is None:
        if not isinstance(losses, Weighted):
            return {**outputs, "loss": losses}
        losses, weights = _terms(losses, None)
        return {**outputs, "loss": losses, "weight": weights}
    mask = jnp.ones((rows,), bool) if mask is None else mask
    if isinstance(losses, Weighted):
        losses, weights = _terms(losses, mask)
        inner = tuple(range(1, losses.ndim))
        weight = weights.sum(inner)
        return {
            **outputs,
            "loss": (losses * weights).sum(inner) / _not_zero(weight),
            "weight": weight,
            "mask": mask,
        }
    # A scalar loss counts once per example, so that means over batches of unequal size are exact.
    return {
        **outputs,
        "loss": jnp.broadcast_to(losses, (rows,)) if losses.ndim == 0 else losses,
        "mask": mask,
    }


def _terms(weighted: Weighted, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Returns losses and weights in which what has no weight is 0."""
    losses, weights = weighted.losses, jax.lax.stop_gradient(weighted.weights)
    counts = weights != 0
    if mask is not None:
        counts &= mask.reshape(mask.shape + (1,) * (weights.ndim - mask.ndim))
    # A product with 0 would not do: what has no weight may be NaN.
    return jnp.where(counts, losses, 0), jnp.where(counts, weights, 0)


def _not_zero(total: jax.Array) -> jax.Array:
    return jnp.where(total != 0, total, 1)
