"""Turns the tensors of other frameworks into NumPy arrays, without importing those frameworks.

Owns the recognition of foreign tensors. Does not judge dtypes or shapes.
"""

import numbers
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from trainkit._core.typing import Batch

_OWN = (np.ndarray, np.generic, jax.Array, numbers.Number)


@runtime_checkable
class _TorchTensor(Protocol):
    def detach(self) -> Any: ...

    def cpu(self) -> Any: ...


@runtime_checkable
class _Tensor(Protocol):
    def numpy(self) -> Any: ...


def to_host(batch: Batch) -> Batch:
    """Returns the batch with tensors as NumPy arrays and unregistered mappings as dicts.

    NumPy arrays, JAX arrays and numbers pass through untouched, and so does what is not recognised.
    """
    leaves, structure = jax.tree_util.tree_flatten(batch)
    if all(isinstance(leaf, _OWN) for leaf in leaves):
        return batch
    return jax.tree_util.tree_unflatten(structure, [_leaf_to_host(leaf) for leaf in leaves])


def _leaf_to_host(leaf: Any) -> Any:
    if isinstance(leaf, _OWN):
        return leaf
    if isinstance(leaf, Mapping):
        return {key: to_host(value) for key, value in leaf.items()}
    if isinstance(leaf, _TorchTensor):
        return leaf.detach().cpu().numpy()
    if isinstance(leaf, _Tensor):
        return leaf.numpy()
    return leaf


def is_torch(value: Any) -> bool:
    """Says whether `value` is a tensor of torch, or behaves as one."""
    return isinstance(value, _TorchTensor)


def is_array(value: Any) -> bool:
    """Says whether `value` is an array of NumPy, JAX or another framework."""
    return isinstance(value, (np.ndarray, jax.Array, _TorchTensor, _Tensor))
