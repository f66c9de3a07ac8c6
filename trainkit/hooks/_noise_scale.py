"""The two estimates behind the gradient noise scale, as a probe. Owns the arithmetic of one step; smooths nothing."""

import functools

import jax
import jax.numpy as jnp

from trainkit._core.typing import PyTree
from trainkit.hooks._hook import StepValues
from trainkit.hooks._numbers import Numbers
from trainkit.hooks._probe import StepProbe


def noise_scale_probe(name: str) -> StepProbe:
    """Returns the probe, which gives `square` and `noise`: unbiased, of |G|^2 and of the trace of the covariance.

    With pieces of `b_i` examples and their gradients `g_i`, and the gradient `g` of all `B` examples,
    `E|g_i|^2 = |G|^2 + tr / b_i` and `E|g|^2 = |G|^2 + tr / B` (McCandlish et al. 2018, appendix A.1, where all pieces
    are of one size). Both are NaN where fewer than two pieces have examples.
    """

    def fn(values: StepValues) -> Numbers:
        assert values.passes is not None  # the step always answers a probe
        pieces = values.passes.pieces("GradientNoiseScale")
        examples = jnp.stack([piece.examples for piece in pieces])
        squares = jnp.stack([_square(piece.grads) for piece in pieces])
        some = examples > 0
        count = some.sum()
        small = jnp.where(some, squares, 0).sum() / count
        # One over the size of a batch, for the pieces in the mean.
        fine = jnp.where(some, 1 / jnp.where(some, examples, 1), 0).sum() / count
        whole, coarse = _square(values.grads), 1 / examples.sum()
        noise = (small - whole) / (fine - coarse)
        valid = count > 1
        return Numbers.of(
            {
                "square": jnp.where(valid, whole - noise * coarse, jnp.nan),
                "noise": jnp.where(valid, noise, jnp.nan),
            }
        )

    return StepProbe(name, fn)


def _square(tree: PyTree) -> jax.Array:
    squares = [
        (jnp.abs(leaf).astype(jnp.float32) ** 2).sum()
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    return functools.reduce(jnp.add, squares)
