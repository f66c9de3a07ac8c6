"""SPMD over a mesh of devices: the batch divided over the `data` axis, the state whole on each device."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from trainkit._typing import Batch, PyTree
from trainkit.parallel._strategy import Forward, Strategy, to_numpy

BATCH_AXIS = "batch"
"""Name under which a layer may reduce over the batch, as in `nn.BatchNorm(axis_name="batch")`."""

# Forced host devices deadlock when more collectives than threads are in flight.
_CPU_STEPS_IN_FLIGHT = 32


class Mesh(Strategy):
    """Data parallelism over the local devices; with one device it is plain `jit`.

    A model sees the whole batch, so batch statistics, losses and metrics are global by construction. A layer
    that names the axis `"batch"` (`nn.BatchNorm(axis_name="batch")`) finds one of size 1 bound.

    Args:
        devices: the devices to use; all local ones by default.

    Raises:
        ValueError: `devices` is empty.

    Example:
        >>> Mesh(devices=jax.local_devices()[:1]).shards
        1
    """

    def __init__(self, *, devices: Sequence[jax.Device] | None = None) -> None:
        if devices is not None and not devices:
            raise ValueError("devices=[] is empty; give at least one device, or None for all local ones.")
        self._devices = None if devices is None else tuple(devices)

    @functools.cached_property
    def devices(self) -> tuple[jax.Device, ...]:
        """The devices of the mesh; found at the first use, so that making a trainer touches no device."""
        return self._devices or tuple(jax.local_devices())

    @property
    def shards(self) -> int:
        return len(self.devices)

    @property
    def blocks_every(self) -> int | None:
        return _CPU_STEPS_IN_FLIGHT if self.shards > 1 or self.devices[0].platform != "cpu" else None

    @functools.cached_property
    def _mesh(self) -> jax.sharding.Mesh:
        return jax.sharding.Mesh(np.asarray(self.devices), ("data",), axis_types=(AxisType.Auto,))

    @functools.cached_property
    def _divided(self) -> NamedSharding:
        return NamedSharding(self._mesh, PartitionSpec("data"))

    @functools.cached_property
    def _whole(self) -> NamedSharding:
        return NamedSharding(self._mesh, PartitionSpec())

    @functools.cached_property
    def _is_default_device(self) -> bool:
        return self.shards == 1 and self.devices[0] == jax.local_devices()[0]

    def map_forward(self, forward: Forward) -> Forward:
        def mapped(*args: Any) -> tuple[Any, Any, Any]:
            # Everything but the dummy is unmapped: the axis exists by name and costs nothing.
            in_axes = (0, *(None for _ in args))
            over_one = jax.vmap(
                lambda _, *inner: forward(*inner), in_axes=in_axes, out_axes=None, axis_name=BATCH_AXIS
            )
            return over_one(jnp.zeros(1), *args)

        return mapped

    def compile(self, fn: Callable[..., Any], *, donate: tuple[int, ...] = ()) -> Callable[..., Any]:
        if self._is_default_device:
            return jax.jit(fn, donate_argnums=donate)
        return jax.jit(fn, donate_argnums=donate, out_shardings=self._whole)

    def place(self, batch: Batch) -> Batch:
        # On the default device the call itself takes NumPy arrays in less time than device_put does.
        return (
            batch
            if self._is_default_device
            else jax.device_put(batch, jax.tree.map(self._sharding_of, batch))
        )

    def replicate(self, tree: PyTree) -> PyTree:
        return jax.device_put(tree) if self._is_default_device else jax.device_put(tree, self._whole)

    def fetch(self, tree: PyTree) -> PyTree:
        return to_numpy(tree)

    def describe(self) -> str:
        return f"data={self.shards} on {self.devices[0].platform}"

    def _sharding_of(self, leaf: Any) -> NamedSharding:
        # What does not divide is held whole by each device: the same numbers, at the price of the division.
        shape = np.shape(leaf)
        return self._divided if shape and shape[0] % self.shards == 0 else self._whole
