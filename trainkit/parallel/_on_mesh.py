"""`OnMesh`: a strategy over a mesh of devices, of one or several processes.

Owns the devices and how arrays get to them. How a step is compiled is the subclass's affair.
"""

import abc
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from trainkit._core.typing import Batch, Device, PyTree
from trainkit.parallel._hosts import count_processes, own_rows, put, put_own
from trainkit.parallel._strategy import Strategy

# Forced host devices deadlock when more collectives than threads are in flight.
_STEPS_IN_FLIGHT = 32


class OnMesh(Strategy, abc.ABC):
    """Places arrays on a mesh: whole on each device, or `[batch, ...]` divided over the axes of the batch.

    Args:
        devices: the devices to use; all by default, those of other processes included.

    Raises:
        ValueError: `devices` is empty.
    """

    def __init__(self, devices: Sequence[Device] | None) -> None:
        if devices is not None and not devices:
            raise ValueError("devices=[] is empty; give at least one device, or None for all.")
        self._devices = None if devices is None else tuple(devices)

    @functools.cached_property
    def devices(self) -> tuple[Device, ...]:
        """The devices of the mesh; found at the first use, so that making a trainer touches no device."""
        devices = self._devices or tuple(jax.devices())
        self._check_devices(devices)
        return devices

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """The mesh over `devices`."""
        return self._make_mesh(self.devices)

    @abc.abstractmethod
    def _make_mesh(self, devices: tuple[Device, ...]) -> jax.sharding.Mesh:
        """Returns the mesh over these devices."""

    @property
    @abc.abstractmethod
    def _batch_axes(self) -> tuple[str, ...]:
        """The axes of the mesh that a batch is divided over."""

    def _check_devices(self, devices: tuple[Device, ...]) -> None:
        """Refuses devices that the strategy can't run on; by default none."""

    @property
    def in_flight(self) -> int | None:
        return _STEPS_IN_FLIGHT

    @property
    def processes(self) -> int:
        return self._processes

    def place(self, batch: Batch) -> Batch:
        return self._put(batch, jax.tree.map(self._rows_sharding, batch))

    def own_rows(self, rows: int) -> slice:
        return own_rows(self._sharding_of((rows,)), rows)

    def place_own(self, batch: Batch, rows: int) -> Batch:
        return put_own(batch, rows, self._sharding_of)

    def replicate(self, tree: PyTree) -> PyTree:
        return self._put(tree, self._whole)

    @functools.cached_property
    def _whole(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @functools.cached_property
    def _divided(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(self._batch_axes))

    @functools.cached_property
    def _processes(self) -> int:
        return count_processes(self.devices)

    def _put(self, tree: PyTree, shardings: PyTree) -> PyTree:
        return jax.device_put(tree, shardings) if self._processes == 1 else put(tree, shardings)

    def _rows_sharding(self, leaf: Any) -> NamedSharding:
        return self._sharding_of(np.shape(leaf))

    def _sharding_of(self, shape: tuple[int, ...]) -> NamedSharding:
        """Returns the sharding of a leaf `[batch, ...]` of that shape; a 0-d leaf is whole."""
        return self._divided if shape else self._whole
