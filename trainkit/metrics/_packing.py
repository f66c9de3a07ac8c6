"""Carries a tree of many small arrays as one vector.

Owns the layout; what the tree means is its maker's affair.

Each output buffer of a compiled step has a price of its own, so small leaves travel together, bit for bit,
in one uint32 vector. Large leaves (and 64-bit or complex ones) keep buffers of their own: copying those into
a vector at each step would cost more than it saves.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

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
        if vector.shape != (self._words,) or len(large) != len(self._large):
            raise ValueError(
                f"The packed metrics must be a vector of {self._words} words and {len(self.leaves)} leaves in all, "
                f"got the shapes {[part.shape for part in (vector, *large)]}. They are of another collection."
            )
        leaves: list[Any] = [None] * len(self.leaves)
        for index, leaf in zip(self._large, large, strict=True):
            leaves[index] = leaf.astype(_wide(leaf.dtype), copy=False)
        for group in self._groups:
            group.read(vector, leaves)
        return self.treedef.unflatten(leaves)

    @functools.cached_property
    def _words(self) -> int:
        return sum(spec.size for spec in self.leaves if _is_packed(spec))

    @functools.cached_property
    def _large(self) -> list[int]:
        return [index for index, spec in enumerate(self.leaves) if not _is_packed(spec)]

    @functools.cached_property
    def _groups(self) -> "list[_Group]":
        starts = np.cumsum([0, *(spec.size if _is_packed(spec) else 0 for spec in self.leaves)])
        by_dtype: dict[np.dtype, list[int]] = {}
        for index, spec in enumerate(self.leaves):
            if _is_packed(spec):
                by_dtype.setdefault(spec.dtype, []).append(index)
        return [_Group.of(self.leaves, starts, indices) for indices in by_dtype.values()]


class _Group(NamedTuple):
    """The packed leaves of one dtype, which are read together.

    Attributes:
        words: where they are in the vector.
        dtype: of the leaves.
        places: of each leaf, its index in the tree, its place in the group, its shape.
    """

    words: np.ndarray
    dtype: np.dtype
    places: list[tuple[int, slice, tuple[int, ...]]]

    @classmethod
    def of(cls, specs: Sequence[jax.ShapeDtypeStruct], starts: np.ndarray, indices: list[int]) -> "_Group":
        stops = np.cumsum([specs[index].size for index in indices]).tolist()
        places = [
            (index, slice(stop - specs[index].size, stop), specs[index].shape)
            for index, stop in zip(indices, stops, strict=True)
        ]
        words = np.concatenate([np.arange(starts[index], starts[index + 1]) for index in indices])
        return cls(words, specs[indices[0]].dtype, places)

    def read(self, vector: np.ndarray, leaves: list[Any]) -> None:
        values = vector[self.words].view(_carrier(self.dtype))
        # By way of its own dtype, which a bool is not told from an int without.
        values = values.astype(self.dtype, copy=False).astype(_wide(self.dtype), copy=False)
        for index, place, shape in self.places:
            leaves[index] = values[place].reshape(shape)
