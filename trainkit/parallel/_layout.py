"""Where each leaf lies on a mesh of devices: a pure function of its path and shape. Owns the rules, no arrays."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from trainkit._tree import path_name
from trainkit._typing import Device, PyTree

AXES = ("data", "fsdp", "tensor")
"""Names of the axes of a mesh, in its order."""

BATCH_AXES = ("data", "fsdp")
"""The axes a batch is divided over: fully sharded data parallelism is data parallelism too."""


def make_mesh(sizes: Mapping[str, int | None], devices: Sequence[Device]) -> jax.sharding.Mesh:
    """Returns a mesh over `devices` with the axes `AXES`; `data=None` takes the devices that are left.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    fixed = math.prod(size for size in sizes.values() if size is not None)
    data = sizes["data"] or max(len(devices) // fixed, 1)
    shape = (data, sizes["fsdp"] or 1, sizes["tensor"] or 1)
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"Mesh(data={shape[0]}, fsdp={shape[1]}, tensor={shape[2]}) takes {math.prod(shape)} devices, and there "
            f"are {len(devices)}. Choose sizes whose product is {len(devices)}, leave data= out to take what is "
            "left, or pass devices=."
        )
    return jax.sharding.Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


class Layout:
    """Shardings of a train state on a mesh.

    In this order: Flax's own partitioning metadata (`nn.with_partitioning`), whose names are axes of the mesh;
    the first of `rules` that matches the path; and for what is left the largest dimension that `fsdp` divides.

    Args:
        mesh: with the axes `AXES`.
        rules: pairs of a regular expression, searched in the path of a parameter, e.g. `Dense_0/kernel`, and
            one axis name or None per dimension.
    """

    def __init__(self, mesh: jax.sharding.Mesh, rules: Sequence[tuple[str, tuple[str | None, ...]]]) -> None:
        self._mesh = mesh
        self._rules = [(re.compile(pattern), spec) for pattern, spec in rules]

    def shardings(self, state: PyTree) -> PyTree:
        """Returns a sharding for each leaf of `state`, which may be abstract."""

        def of_box(path: tuple[Any, ...], leaf: Any) -> Any:
            if not isinstance(leaf, nn.Partitioned):
                return self._sharding(self._spec(path_name(path), leaf))
            return leaf.replace(value=self._sharding(self._boxed_spec(path_name(path), leaf)))

        return jax.tree_util.tree_map_with_path(
            of_box, state, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)
        )

    def check_rules(self, params: PyTree) -> None:
        """Refuses a rule that matches no parameter.

        Raises:
            ValueError: names the rules, and the parameters there are.
        """
        names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        idle = [rule.pattern for rule, _ in self._rules if not any(rule.search(name) for name in names)]
        if idle:
            raise ValueError(f"rules {idle} match no parameter; the parameters are {', '.join(names)}.")

    def _sharding(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self._mesh, spec)

    def _boxed_spec(self, name: str, box: nn.Partitioned) -> PartitionSpec:
        unknown = [axis for axis in box.names if axis is not None and axis not in AXES]
        if unknown:
            raise ValueError(
                f"{name} is partitioned over the axes {unknown}; the mesh has {AXES}. Use these names in "
                "nn.with_partitioning."
            )
        return self._fitted(name, box.names, np.shape(box.value))

    def _spec(self, name: str, leaf: Any) -> PartitionSpec:
        shape = np.shape(leaf)
        # Optimizer state and averages that mirror a parameter have its path as a suffix, and its shape.
        parts = name.split("/")
        suffixes = ["/".join(parts[start:]) for start in range(len(parts))]
        for pattern, spec in self._rules:
            if len(spec) == len(shape) and any(pattern.search(suffix) for suffix in suffixes):
                return self._fitted(name, spec, shape)
        return self._fully_sharded(shape) if jnp.issubdtype(leaf.dtype, jnp.inexact) else PartitionSpec()

    def _fitted(self, name: str, spec: Sequence[str | None], shape: tuple[int, ...]) -> PartitionSpec:
        for axis, size in zip(spec, shape, strict=True):
            if axis is not None and size % self._mesh.shape[axis]:
                raise ValueError(
                    f"{name} has shape {list(shape)}, and {size} is not divisible by {axis}={self._mesh.shape[axis]}. "
                    "Change the size of the layer or the rule."
                )
        return PartitionSpec(*spec)

    def _fully_sharded(self, shape: tuple[int, ...]) -> PartitionSpec:
        parts = self._mesh.shape["fsdp"]
        sizes = [
            (size, -dim)
            for dim, size in enumerate(shape)
            if parts > 1 and size % parts == 0 and size >= parts
        ]
        if not sizes:
            return PartitionSpec()
        dim = -max(sizes)[1]
        return PartitionSpec(*(None,) * dim, "fsdp")
