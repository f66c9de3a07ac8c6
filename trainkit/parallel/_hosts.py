"""Arrays on the devices of several processes, from what each process has and back. Owns no layout."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from trainkit._core.tree import is_key
from trainkit._core.typing import Batch, Device, PyTree


def count_processes(devices: Sequence[Device]) -> int:
    """Returns the number of processes that `devices` belong to."""
    return len({device.process_index for device in devices})


def own_rows(sharding: NamedSharding, rows: int) -> slice:
    """Returns the rows of a leaf `[rows, ...]` laid out by `sharding` that this process places."""
    found = sharding.addressable_devices_indices_map((rows,)).values()
    parts = [index[0].indices(rows) for index in found if index is not None]
    return slice(min(start for start, _, _ in parts), max(stop for _, stop, _ in parts))


def put(tree: PyTree, shardings: PyTree) -> PyTree:
    """Returns `tree` laid out over several processes, each of which holds the same values of the whole.

    Args:
        tree: arrays on the host or this process's devices, equal on every process; or on all devices already.
        shardings: one per leaf, or one for all.
    """
    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda leaf: _put_leaf(leaf, shardings), tree)
    return jax.tree.map(_put_leaf, tree, shardings)


def put_own(batch: Batch, rows: int, sharding_of: Callable[[tuple[int, ...]], NamedSharding]) -> Batch:
    """Returns a batch of `rows` rows over several processes, from the rows that this one places.

    Args:
        batch: leaves `[own rows, ...]`; 0-d leaves are equal on every process.
        rows: rows of the whole batch.
        sharding_of: the sharding for the shape of a whole leaf.
    """

    def of(leaf: Any) -> jax.Array:
        shape = (rows, *np.shape(leaf)[1:]) if np.ndim(leaf) else ()
        return jax.make_array_from_process_local_data(sharding_of(shape), np.asarray(leaf), shape)

    return jax.tree.map(of, batch)


def to_host(leaf: Any) -> np.ndarray:
    """Returns all of `leaf` as a NumPy array on every process; where it is divided, all must call."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def _put_leaf(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if is_key(leaf):
        # The layout of a key is that of its data, which have one more dimension: whole along it.
        data = _put_leaf(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    value = np.asarray(leaf)
    value = value.astype(jax.dtypes.canonicalize_dtype(value.dtype), copy=False)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
