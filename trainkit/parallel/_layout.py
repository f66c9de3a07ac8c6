"""Where each leaf lies on a mesh of devices: a pure function of its path and shape. Owns the rules, no arrays."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.spmd import logical_to_mesh_axes
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from trainkit._core.patterns import Patterns
from trainkit._core.tree import path_name
from trainkit._core.typing import Device, PyTree

_LOG = logging.getLogger("trainkit")

AXES = ("data", "fsdp", "tensor")
"""Names of the axes of a mesh, in its order."""

BATCH_AXES = ("data", "fsdp")
"""The axes a batch is divided over: fully sharded data parallelism is data parallelism too."""

Rules = Sequence[tuple[str, tuple[str | None, ...]]]
"""Pairs of a regular expression and one axis name or None per dimension."""

Axis = str | tuple[str, ...] | None
"""What divides one dimension: an axis of the mesh, several, or none."""


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


def check_axes(rules: Rules) -> None:
    """Refuses rules that name an axis no mesh has.

    Raises:
        ValueError: names the rule and the axes there are.
    """
    for pattern, spec in rules:
        unknown = [axis for axis in spec if axis is not None and axis not in AXES]
        if unknown:
            raise ValueError(f"the rule {pattern!r} names the axes {unknown}; the mesh has {AXES}.")


class Layout:
    """Shardings of a train state on a mesh.

    In this order: Flax's own partitioning metadata, whose names are axes of the mesh (`nn.with_partitioning`), or
    are mapped to them by Flax's logical rules (`nn.with_logical_partitioning`); the first of `rules` that matches the
    path and has one entry per dimension; and for what is left the largest dimension that `fsdp` divides. A dimension
    under a logical name that is neither mapped nor an axis of the mesh is not divided, which is said once.

    Args:
        mesh: with the axes `AXES`.
        rules: pairs of a regular expression, searched in the path of a parameter, e.g. `Dense_0/kernel`, and
            one axis name or None per dimension.
    """

    def __init__(self, mesh: jax.sharding.Mesh, rules: Rules) -> None:
        self._mesh = mesh
        self._patterns = Patterns("Mesh(rules=)", [pattern for pattern, _ in rules])
        self._specs = [tuple(spec) for _, spec in rules]
        self._told: set[str] = set()

    def shardings(self, state: PyTree) -> PyTree:
        """Returns a sharding for each leaf of `state`, which may be abstract."""

        def of(path: tuple[Any, ...], leaf: Any) -> Any:
            if isinstance(leaf, nn.Partitioned):
                return leaf.replace(value=self._sharding(self._boxed_spec(path_name(path), leaf)))
            return self._sharding(self._spec(path_name(path), leaf))

        return jax.tree_util.tree_map_with_path(of, state, is_leaf=_is_box)

    def check(self, params: PyTree) -> None:
        """Refuses parameters that cannot be laid out as the rules and their own metadata say.

        Raises:
            ValueError: a rule matches no parameter, metadata name an axis that no mesh has, or an axis does not
                divide a dimension; names the parameter and its shape.
        """
        leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_box)
        named = [(path_name(path), leaf) for path, leaf in leaves]
        for name, leaf in named:
            if isinstance(leaf, nn.Partitioned):
                self._check_box(name, leaf)
                self._check_divides(name, self._boxed_axes(name, leaf), np.shape(leaf.value))
            elif (spec := self._rule(name, leaf)) is not None:
                self._check_divides(name, spec, np.shape(leaf))
        self._check_idle([(name, np.shape(_value(leaf))) for name, leaf in named if not _is_settled(leaf)])
        self._tell([axis for _, leaf in named if _is_box(leaf) for axis in _mesh_axes(leaf)[1]])

    def _check_idle(self, named: list[tuple[str, tuple[int, ...]]]) -> None:
        idle = [
            f"({self._patterns.patterns[index]!r}, {spec})"
            for index, spec in enumerate(self._specs)
            if not any(self._patterns.found(index, name) and len(spec) == len(shape) for name, shape in named)
        ]
        if idle:
            there = ", ".join(f"{name} {list(shape)}" for name, shape in named)
            raise ValueError(
                f"rules {', '.join(idle)} match no parameter; a rule needs a pattern found in the path and one entry "
                f"per dimension. The parameters are {there}."
            )

    def _check_divides(self, name: str, spec: Sequence[Axis], shape: tuple[int, ...]) -> None:
        for axis, size in zip(spec, shape, strict=True):
            if size % self._parts(axis):
                raise ValueError(
                    f"{name} has shape {list(shape)}, and {size} is not divisible by "
                    f"{'*'.join(_each(axis))}={self._parts(axis)}. Change the size of the layer, the rule or its "
                    "partitioning."
                )

    def _check_box(self, name: str, box: nn.Partitioned) -> None:
        unknown = _mesh_axes(box)[1]
        divided = self._mesh.shape["fsdp"] * self._mesh.shape["tensor"] > 1
        # A logical name is free to mean nothing here; that of an axis is a slip where parameters are divided.
        if unknown and divided and not isinstance(box, nn.LogicallyPartitioned):
            raise ValueError(
                f"{name} is partitioned over the axes {unknown}; the mesh has {AXES}. Use these names in "
                "nn.with_partitioning."
            )
        if len(box.names) > np.ndim(box.value):
            raise ValueError(
                f"{name} has shape {list(np.shape(box.value))} and is partitioned by {box.names}: "
                "nn.with_partitioning takes one name or None per dimension."
            )

    def _tell(self, unknown: Sequence[str]) -> None:
        new = sorted(set(unknown) - self._told)
        if new:
            self._told.update(new)
            _LOG.warning(
                "dimensions of parameters under the names %s are not divided: the mesh has the axes %s, and no rule "
                "maps them. To divide them give nn.with_logical_partitioning(..., rules=) pairs such as (%r, 'tensor')",
                new,
                AXES,
                new[0],
            )

    def _parts(self, axis: Axis) -> int:
        return math.prod(self._mesh.shape[one] for one in _each(axis))

    def _sharding(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self._mesh, spec)

    def _boxed_spec(self, name: str, box: nn.Partitioned) -> PartitionSpec:
        shape = np.shape(box.value)
        # The optimizer may keep values of another shape in the boxes of the parameters.
        fitted = self._fitted(self._boxed_axes(name, box), shape)
        return self._fully_sharded(shape) if fitted is None else fitted

    def _boxed_axes(self, name: str, box: nn.Partitioned) -> Sequence[Axis]:
        spec, unknown = _mesh_axes(box)
        rule = self._rule(name, box.value) if unknown and not any(spec) else None
        return spec if rule is None else rule

    def _spec(self, name: str, leaf: Any) -> PartitionSpec:
        shape, spec = np.shape(leaf), self._rule(name, leaf)
        fitted = None if spec is None else self._fitted(spec, shape)
        if fitted is not None:
            return fitted
        return self._fully_sharded(shape) if jnp.issubdtype(leaf.dtype, jnp.inexact) else PartitionSpec()

    def _rule(self, name: str, leaf: Any) -> tuple[str | None, ...] | None:
        # Optimizer state and averages that mirror a parameter have its path as a suffix, and its shape.
        parts = name.split("/")
        suffixes = ["/".join(parts[start:]) for start in range(len(parts))]
        for index, spec in enumerate(self._specs):
            if len(spec) == np.ndim(leaf) and any(self._patterns.found(index, one) for one in suffixes):
                return spec
        return None

    def _fitted(self, spec: Sequence[Axis], shape: tuple[int, ...]) -> PartitionSpec | None:
        if len(spec) != len(shape):
            return None
        divides = (size % self._parts(axis) == 0 for axis, size in zip(spec, shape, strict=True))
        return PartitionSpec(*spec) if all(divides) else None

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


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.Partitioned)


def _value(leaf: Any) -> Any:
    return leaf.value if isinstance(leaf, nn.Partitioned) else leaf


def _is_settled(leaf: Any) -> bool:
    """Says whether metadata alone say where a parameter lies, so that no rule can be meant for it."""
    if not _is_box(leaf):
        return False
    spec, unknown = _mesh_axes(leaf)
    return any(spec) or not unknown


def _mesh_axes(box: nn.Partitioned) -> tuple[tuple[Axis, ...], list[str]]:
    """Returns what divides each dimension of a box, and the names that are no axes of a mesh and mapped to none."""
    # What metadata leave out at the end is not divided.
    names = (*box.names, *(None,) * (np.ndim(box.value) - len(box.names)))
    rules = ()
    if isinstance(box, nn.LogicallyPartitioned):
        rules = tuple(box.rules or nn.get_logical_axis_rules())
    ruled = {name for name, _ in rules}
    mapped = tuple(logical_to_mesh_axes(names, rules) or ()) if rules else names
    axes = [to if name in ruled else name for name, to in zip(names, mapped, strict=True)]
    unknown = [one for axis in axes for one in _each(axis) if one not in AXES]
    return tuple(axis if set(_each(axis)) <= set(AXES) else None for axis in axes), unknown


def _each(axis: Axis) -> tuple[str, ...]:
    return (axis,) if isinstance(axis, str) else axis or ()
