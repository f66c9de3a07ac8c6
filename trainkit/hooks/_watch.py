"""Norms and histograms of parameters, gradients and updates, as a probe. Owns the numbers; the callback writes them."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from trainkit._core.tree import path_name
from trainkit._core.typing import PyTree
from trainkit.hooks._hook import StepValues
from trainkit.hooks._numbers import Numbers
from trainkit.hooks._probe import StepProbe

BUCKETS = 32
"""Buckets of a histogram."""


@flax.struct.dataclass
class Histograms:
    """Named histograms of the finite elements of arrays, in buckets of equal width.

    Attributes:
        low: `float32[n]`, least elements.
        high: `float32[n]`, largest elements.
        counts: `int32[n, BUCKETS]`; all 0 where no element is finite.
        names: static.
    """

    low: jax.Array
    high: jax.Array
    counts: jax.Array
    names: tuple[str, ...] = flax.struct.field(pytree_node=False)


def watch_probe(
    name: str, what: Sequence[str], *, norms: bool, histograms: bool, by_layer: bool
) -> StepProbe:
    """Returns the probe; see `trainkit.callbacks.Watch` for the arguments."""

    def fn(values: StepValues) -> dict[str, Any]:
        trees = {one: _floats(_tree(values, one)) for one in what}
        trees = {one: leaves for one, leaves in trees.items() if leaves}
        if not trees:
            raise ValueError(
                f"Watch(what={tuple(what)!r}): there is nothing to watch, because this trainer has its own train_step, "
                "which tells no gradients. Watch 'params' or 'updates'."
            )
        found: dict[str, Any] = {}
        if norms:
            found["norms"] = _norms(values, trees, by_layer)
        if histograms:
            found["histograms"] = _histograms(trees)
        return found

    return StepProbe(name, fn)


def _tree(values: StepValues, what: str) -> PyTree:
    assert values.before is not None  # the step always tells
    return {"params": values.before.params, "grads": values.grads, "updates": values.updates}[what]


def _floats(tree: PyTree) -> dict[tuple[Any, ...], jax.Array]:
    """Returns the leaves that have a norm by their paths; none of a tree that is None."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path: leaf for path, leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)}


def _norms(values: StepValues, trees: dict[str, dict[tuple[Any, ...], jax.Array]], by_layer: bool) -> Numbers:
    found: dict[str, jax.Array] = {}
    for what, leaves in trees.items():
        squares = {path: _square(leaf) for path, leaf in leaves.items()}
        found[f"watch/{what}/norm"] = _root(list(squares.values()))
        layers: dict[str, list[jax.Array]] = {}
        for path, square in squares.items():
            layers.setdefault(path_name(path[:-1]), []).append(square)
        if by_layer:
            found |= {f"watch/{what}/norm/{layer}": _root(of_layer) for layer, of_layer in layers.items()}
    if "updates" in trees:
        params = found.get("watch/params/norm")
        if params is None:
            params = _root([_square(leaf) for leaf in _floats(_tree(values, "params")).values()])
        found["watch/update_ratio"] = found["watch/updates/norm"] / params
    return Numbers.of(found)


def _square(leaf: jax.Array) -> jax.Array:
    magnitude = jnp.abs(leaf)
    return (magnitude.astype(jnp.promote_types(magnitude.dtype, jnp.float32)) ** 2).sum().astype(jnp.float32)


def _root(squares: list[jax.Array]) -> jax.Array:
    return jnp.sqrt(functools.reduce(jnp.add, squares))


def _histograms(trees: dict[str, dict[tuple[Any, ...], jax.Array]]) -> Histograms:
    parts, names = [], []
    for what, leaves in trees.items():
        for path, leaf in leaves.items():
            parts.append(_histogram(leaf))
            names.append(f"watch/{what}/{path_name(path)}")
    low, high, counts = (jnp.stack(of_all) for of_all in zip(*parts, strict=True))
    return Histograms(low, high, counts, tuple(names))


def _histogram(leaf: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    elements = jnp.abs(leaf) if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else leaf
    elements = elements.reshape(-1).astype(jnp.float32)
    finite = jnp.isfinite(elements)
    low = jnp.where(finite, elements, jnp.inf).min(initial=jnp.inf)
    high = jnp.where(finite, elements, -jnp.inf).max(initial=-jnp.inf)
    # In the middle of what float32 holds: neither a width nor one over it, which the compiler takes, leaves it.
    scale = jnp.where(jnp.maximum(-low, high) > 1, 2.0**-64, 2.0**64)
    width = high * scale - low * scale
    place = (elements * scale - low * scale) / jnp.where(width > 0, width, 1)
    bucket = jnp.clip((place * BUCKETS).astype(jnp.int32), 0, BUCKETS - 1)
    counts = jnp.zeros((BUCKETS,), jnp.int32).at[bucket].add(finite.astype(jnp.int32))
    return low, high, counts
