"""Type aliases that several layers share. Owns no behaviour."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

PyTree = Any
"""Any tree of dicts, lists, tuples and registered nodes with arrays as leaves."""

Array = jax.Array | np.ndarray
"""An array on a device or on the host."""

Batch = PyTree
"""A tree of arrays that agree in their leading dimension, `[batch, ...]`; 0-d leaves are shared by all rows."""

Collection = Mapping[str, Any]
"""One Flax variable collection, e.g. `batch_stats`."""

Variables = Mapping[str, Collection]
"""Flax variables: collections by name."""

Outputs = Mapping[str, Any]
"""What a step hands to the metrics, by name."""

Device = Any
"""A `jax.Device`, which type checkers take for a variable."""

Clock = Callable[[], float]
"""Returns seconds; injected so that tests own the time."""
