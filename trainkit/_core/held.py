"""What an array takes on the devices, and how it lies on them. Owns no array."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding


def bytes_of(leaf: Any) -> int:
    """Returns the bytes of an array, whole."""
    return leaf.size * leaf.dtype.itemsize


def bytes_per_device(leaf: Any) -> int:
    """Returns the bytes of an array that one device holds."""
    if not isinstance(leaf, jax.Array):
        return bytes_of(leaf)
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def sharding_of(leaf: Any) -> str:
    """Returns the axis of the mesh of each dimension, e.g. `None, fsdp`, or "whole"."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_replicated:
        return "whole"
    if not isinstance(leaf.sharding, NamedSharding):
        return str(leaf.sharding)
    spec = (*leaf.sharding.spec, *(None,) * np.ndim(leaf))[: np.ndim(leaf)]
    return ", ".join(map(str, spec))
