"""What of the parameters a step differentiates: a partition known before anything is compiled. Owns no choice of it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from trainkit._core.typing import PyTree


def split(params: PyTree, moving: Sequence[bool] | None) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """Returns what is trained of the parameters, and what makes all of them of it again.

    Args:
        params: the parameters.
        moving: for each leaf whether it is trained; None for all.
    """
    if moving is None or all(moving):
        return params, lambda trained: trained
    leaves, structure = jax.tree.flatten(params)

    def joined(trained: list[Any]) -> PyTree:
        new = iter(trained)
        return structure.unflatten(
            [next(new) if moves else leaf for leaf, moves in zip(leaves, moving, strict=True)]
        )

    return [leaf for leaf, moves in zip(leaves, moving, strict=True) if moves], joined


def with_zeros(grads: PyTree, params: PyTree, moving: Sequence[bool] | None) -> PyTree:
    """Returns gradients of the structure of `params` from those of what `split` says is trained: 0 for the rest."""
    return split(jax.tree.map(jnp.zeros_like, params), moving)[1](grads)


def with_still(new: PyTree, old: PyTree, moving: Sequence[bool] | None) -> PyTree:
    """Returns parameters after an update, of which those that are not trained are the very arrays of before."""
    return split(old, moving)[1](split(new, moving)[0])
