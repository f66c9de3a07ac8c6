"""`Pmap`: one replica of the step per device, which meet only in named reductions."""

import collections
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from trainkit._core.typing import Batch, Device, PyTree
from trainkit.parallel._on_mesh import OnMesh
from trainkit.parallel._strategy import Forward, Role


@final
class Pmap(OnMesh):
    """One replica per device, each with its part of the batch and a key of its own.

    Gradients, losses and metrics are sums over the replicas, weighted by real examples; a scalar loss is taken for
    the mean over the rows of its replica. A layer that names the
    axis (`nn.BatchNorm(axis_name="batch")`) sees the whole batch. One that does not keeps statistics of its
    replica: these are merged at the end of every step, a pair `mean` and `var` as the mean and variance of the
    mixture of the replicas (its second moment, not the mean of the variances), any other float as the mean.

    It is what `jax.pmap` does, built on `jax.shard_map`; the state keeps its shapes, with no leading axis.

    Args:
        axis_name: name of the axis over the devices.
        devices: the devices to use; all by default, those of other processes included.

    Example:
        >>> Pmap(devices=jax.local_devices()[:1]).shards
        1
    """

    def __init__(self, *, axis_name: str = "batch", devices: Sequence[Device] | None = None) -> None:
        super().__init__(devices)
        self.axis_name = axis_name

    def _make_mesh(self, devices: tuple[Device, ...]) -> jax.sharding.Mesh:
        return jax.sharding.Mesh(np.asarray(devices), (self.axis_name,), axis_types=(AxisType.Auto,))

    @property
    def _batch_axes(self) -> tuple[str, ...]:
        return (self.axis_name,)

    def _check_devices(self, devices: tuple[Device, ...]) -> None:
        _check_equal_shares(devices)

    @property
    def shards(self) -> int:
        return len(self.devices)

    @property
    def replica_axis(self) -> str | None:
        return self.axis_name

    def example(self, batch: Batch) -> Batch:
        return batch

    def map_forward(self, forward: Forward) -> Forward:
        def on_replica(variables: Any, batch: Batch, mask: jax.Array, step: jax.Array, rng: jax.Array) -> Any:
            own = jax.random.fold_in(rng, jax.lax.axis_index(self.axis_name))
            return forward(variables, batch, mask, step, own)

        return on_replica

    def merge_collections(self, updated: PyTree) -> PyTree:
        return _merge(updated, self.axis_name)

    def compile(
        self,
        fn: Callable[..., Any],
        *,
        inputs: tuple[Role, ...],
        outputs: tuple[Role, ...] | Role,
        donate: tuple[int, ...] = (),
    ) -> Callable[..., Any]:
        @functools.wraps(fn)
        def replicated(*args: Any) -> Any:
            in_specs = tuple(self._specs(role, arg) for role, arg in zip(inputs, args, strict=True))
            out_specs = (
                self._prefix(outputs) if isinstance(outputs, Role) else tuple(map(self._prefix, outputs))
            )
            # Replicas may differ until they are merged, which is what check_vma would refuse.
            mapped = jax.shard_map(
                fn, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
            )
            return mapped(*args)

        return jax.jit(replicated, donate_argnums=donate)

    def place(self, batch: Batch) -> Batch:
        rows = {np.shape(leaf)[0] for leaf in jax.tree.leaves(batch) if np.ndim(leaf)}
        self._check_rows(rows)
        return super().place(batch)

    def own_rows(self, rows: int) -> slice:
        self._check_rows({rows})
        return super().own_rows(rows)

    def _check_rows(self, rows: set[int]) -> None:
        uneven = [size for size in rows if size % self.shards]
        if uneven:
            raise ValueError(
                f"a batch of {uneven[0]} cannot be divided over {self.shards} replicas, and it is not padded because "
                "the loss is a scalar, the model keeps batch statistics or train_step is your own. Use a batch size "
                f"divisible by {self.shards}, drop_last=True, or strategy='jit'."
            )

    def lay_out(self, state: PyTree) -> PyTree:
        return self.replicate(state)

    def shardings(self, state: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: self._whole, state)

    def describe(self) -> str:
        return f"{self.shards} replicas on {self.devices[0].platform}"

    def _prefix(self, role: Role) -> PartitionSpec:
        return PartitionSpec(self.axis_name) if role is Role.ROWS else PartitionSpec()

    def _specs(self, role: Role, argument: PyTree) -> PyTree:
        if role is not Role.ROWS:
            return PartitionSpec()
        return jax.tree.map(lambda leaf: self._rows_sharding(leaf).spec, argument)


def _check_equal_shares(devices: Sequence[Device]) -> None:
    counts = collections.Counter(device.process_index for device in devices)
    if len(set(counts.values())) > 1:
        each = ", ".join(f"process {process} has {count}" for process, count in sorted(counts.items()))
        raise ValueError(
            f"pmap runs the same number of replicas on each process, and {each}. Start every process with as many "
            "devices, pass devices= with equally many of each, or use strategy='jit'."
        )


def _merge(node: Any, axis: str) -> Any:
    """Merges the collections of all replicas; see `Pmap` for the rule."""
    if isinstance(node, Mapping):
        if {"mean", "var"} <= set(node):
            mean, var = jax.lax.pmean((node["mean"], node["var"]), axis)
            between = jax.lax.pmean((node["mean"] - mean) ** 2, axis)
            rest = {key: _merge(value, axis) for key, value in node.items() if key not in ("mean", "var")}
            return {**rest, "mean": mean, "var": var + between}
        return {key: _merge(value, axis) for key, value in node.items()}
    return jax.tree.map(lambda leaf: _mean_of_floats(leaf, axis), node)


def _mean_of_floats(leaf: jax.Array, axis: str) -> jax.Array:
    # Integers count what every replica does alike.
    return jax.lax.pmean(leaf, axis) if jnp.issubdtype(leaf.dtype, jnp.inexact) else jax.lax.pmax(leaf, axis)
