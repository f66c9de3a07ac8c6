"""Carries a tree of many small arrays as one vector.

Owns the layout; what the tree means is its maker's affair.

Each output buffer of a compiled step has a price of its own, so small leaves travel together, bit for bit,
in one uint32 vector. Large leaves (and 64-bit or complex ones) keep buffers of their own: copying those into
a vector at each step would cost more than it saves.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Packed = tuple[Any, ...]

_LARGEST_PACKED = 1024


@functools.cache
def _carrier(dtype: np.dtype) -> np.dtype:
    """Returns the 32-bit dtype that holds every value of `dtype`."""
    if jnp.issubdtype(dtype, jnp.floating):
        return np.dtype(np.float32)
    return np.dtype(np.int32) if jnp.issubdtype(dtype, jnp.signedinteger) else np.dtype(np.uint32)


@functools.cache
def _has_carrier(dtype: Any) -> bool:
    if jnp.issubdtype(dtype, jax.dtypes.extended) or jnp.issubdtype(dtype, jnp.complexfloating):
        return False
    return dtype.itemsize <= 4


@functools.cache
def _wide(dtype: np.dtype) -> np.dtype:
    """Returns the 64-bit dtype of the kind of `dtype`, complex numbers having two parts; bools stay."""
    kinds = {
        jnp.floating: np.float64,
        jnp.signedinteger: np.int64,
        jnp.unsignedinteger: np.uint64,
        jnp.complexfloating: np.complex128,
    }
    return next((np.dtype(wide) for kind, wide in kinds.items() if jnp.issubdtype(dtype, kind)), dtype)


def _is_packed(leaf: jax.ShapeDtypeStruct) -> bool:
    return leaf.size <= _LARGEST_PACKED and _has_carrier(leaf.dtype)


def _widened(leaf: np.ndarray) -> np.ndarray:
    return leaf.astype(_wide(leaf.dtype), copy=False)


@dataclasses.dataclass(frozen=True)
class Packing:
    """The layout of one tree.

    Args:
        treedef: the tree's structure.
        leaves: shape and dtype of every leaf.
    """

    treedef: Any
    leaves: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def of(cls, spec: Any) -> "Packing":
        """Returns the layout of a tree of `jax.ShapeDtypeStruct`."""
        leaves, treedef = jax.tree.flatten(spec)
        return cls(treedef, tuple(jax.ShapeDtypeStruct(leaf.shape, np.dtype(leaf.dtype)) for leaf in leaves))

    def pack(self, tree: Any) -> Packed:
        """Returns the tree as `(uint32 vector, *large leaves)`; traceable.

        Args:
            tree: has the layout's structure; leaves are broadcast and cast to the layout's shapes and dtypes.

        Returns:
            The vector, then every leaf that is not in it.
        """
        words, large = [jnp.zeros((0,), jnp.uint32)], []
        for leaf, spec in zip(self.treedef.flatten_up_to(tree), self.leaves, strict=True):
            leaf = jnp.broadcast_to(jnp.asarray(leaf).astype(spec.dtype), spec.shape)
            if _is_packed(spec):
                leaf = leaf.reshape(-1).astype(_carrier(spec.dtype))
                words.append(jax.lax.bitcast_convert_type(leaf, jnp.uint32))
            else:
                large.append(leaf)
        return (jnp.concatenate(words), *large)

    def pack_on_host(self, tree: Any) -> tuple[np.ndarray, ...]:
        """Returns what `pack` does, as NumPy arrays; `tree` has concrete leaves."""
        words, large = [np.zeros((0,), np.uint32)], []
        for leaf, spec in zip(self.treedef.flatten_up_to(tree), self.leaves, strict=True):
            leaf = np.broadcast_to(np.asarray(leaf).astype(spec.dtype), spec.shape)
            if _is_packed(spec):
                words.append(leaf.reshape(-1).astype(_carrier(spec.dtype)).view(np.uint32))
            else:
                large.append(leaf)
        return (np.concatenate(words), *large)

    def unpack(self, packed: Packed) -> Any:
        """Returns the tree from what `pack` returned; traceable."""
        vector, *large = packed
        leaves, start, rest = [], 0, iter(large)
        for spec in self.leaves:
            if not _is_packed(spec):
                leaves.append(next(rest))
                continue
            words = vector[start : start + spec.size]
            start += spec.size
            leaf = jax.lax.bitcast_convert_type(words, _carrier(spec.dtype))
            leaves.append(leaf.astype(spec.dtype).reshape(spec.shape))
        return self.treedef.unflatten(leaves)

    def unpack_wide(self, packed: Sequence[Any]) -> Any:
        """Returns the tree on the host, with NumPy leaves of 64 bits.

        Args:
            packed: what `pack` returned, as NumPy or JAX arrays.

        Returns:
            The tree, floats as float64, integers as int64 or uint64.

        Raises:
            ValueError: if the arrays do not have this layout.
        """
        vector, *large = (np.asarray(part) for part in packed)
        parts, size, others = self._plan
        if vector.shape != (size,) or len(large) != others:
            raise ValueError(
                f"The packed metrics must be a vector of {size} words and {len(self.leaves)} leaves in all, "
                f"got the shapes {[part.shape for part in (vector, *large)]}. They are of another collection."
            )
        vector, rest = np.ascontiguousarray(vector), iter(large)
        return self.treedef.unflatten(
            [_widened(next(rest)) if part is None else part(vector) for part in parts]
        )

    @functools.cached_property
    def _plan(self) -> tuple[list[Callable[[np.ndarray], np.ndarray] | None], int, int]:
        """How each leaf is read from the vector on the host, None for those not in it; its size; those not in it."""
        parts, start = [], 0
        for spec in self.leaves:
            parts.append(_reader(spec, start) if _is_packed(spec) else None)
            start += spec.size if _is_packed(spec) else 0
        return parts, start, parts.count(None)


def _reader(spec: jax.ShapeDtypeStruct, start: int) -> Callable[[np.ndarray], np.ndarray]:
    stop, carrier, dtype, wide = start + spec.size, _carrier(spec.dtype), spec.dtype, _wide(spec.dtype)

    def read(vector: np.ndarray) -> np.ndarray:
        leaf = vector[start:stop].view(carrier)
        # By way of its own dtype, which a bool is not told from an int without.
        leaf = leaf if carrier == dtype else leaf.astype(dtype)
        return leaf.astype(wide, copy=False).reshape(spec.shape)

    return read
