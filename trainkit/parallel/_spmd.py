"""One program for all devices: what `Mesh` and `PerExample` share. Owns its compilation and the layout of states."""

import abc
import copy
import functools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax
from jax.sharding import NamedSharding, SingleDeviceSharding

from trainkit._core.state import TrainState
from trainkit._core.tree import is_key
from trainkit._core.typing import Batch, Device, PyTree
from trainkit.parallel._layout import AXES, BATCH_AXES, Layout, Rules, check_axes, make_mesh
from trainkit.parallel._on_mesh import OnMesh
from trainkit.parallel._strategy import Role

_LOG = logging.getLogger("trainkit")


class Spmd(OnMesh, abc.ABC):
    """A strategy in which one program spans a mesh of devices and XLA divides the work."""

    def __init__(
        self,
        *,
        sizes: Mapping[str, int | None],
        rules: Rules = (),
        devices: Sequence[Device] | None = None,
    ) -> None:
        super().__init__(devices)
        for name, size in sizes.items():
            if size is not None and (not isinstance(size, int) or size < 1):
                raise ValueError(f"{name}={size!r}: must be an int of at least 1.")
        check_axes(rules)
        self._sizes, self._rules = dict(sizes), tuple(rules)

    def with_names(self, names: Mapping[str, tuple[str | None, ...]]) -> Self:
        known = {path: tuple(one if one in AXES else None for one in spec) for path, spec in names.items()}
        unknown = sorted({one for spec in names.values() for one in spec if one not in (None, *AXES)})
        if unknown:
            _LOG.warning(
                "dimensions of parameters under the names %s are not divided: the mesh has the axes %s. To divide them "
                "use these names, or Mesh(rules=).",
                unknown,
                AXES,
            )
        named = tuple((f"^{re.escape(path)}$", spec) for path, spec in known.items() if any(spec))
        if not named:
            return self
        named_here = copy.copy(self)
        vars(named_here).pop("_layout", None)
        named_here._rules = (*named, *self._rules)
        return named_here

    def _make_mesh(self, devices: tuple[Device, ...]) -> jax.sharding.Mesh:
        return make_mesh(self._sizes, devices)

    @property
    def _batch_axes(self) -> tuple[str, ...]:
        return BATCH_AXES

    @property
    def shards(self) -> int:
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def in_flight(self) -> int | None:
        # One CPU device limits itself.
        return None if len(self.devices) == 1 and self.devices[0].platform == "cpu" else super().in_flight

    @property
    def replica_axis(self) -> str | None:
        return None

    def merge_collections(self, updated: PyTree) -> PyTree:
        return updated

    def compile(
        self,
        fn: Callable[..., Any],
        *,
        inputs: tuple[Role, ...],
        outputs: tuple[Role, ...] | Role,
        donate: tuple[int, ...] = (),
    ) -> Callable[..., Any]:
        if self._is_default_device:
            return jax.jit(fn, donate_argnums=donate)

        @functools.wraps(fn)
        def laid_out(*args: Any) -> Any:
            results = fn(*args)
            if isinstance(outputs, Role):
                return self._constrain(outputs, results)
            return tuple(self._constrain(role, part) for role, part in zip(outputs, results, strict=True))

        return jax.jit(laid_out, donate_argnums=donate)

    def place(self, batch: Batch) -> Batch:
        # On the default device the call itself takes NumPy arrays in less time than device_put does.
        return batch if self._is_default_device else super().place(batch)

    @property
    def takes_host_batches(self) -> bool:
        return self._is_default_device

    def replicate(self, tree: PyTree) -> PyTree:
        return jax.device_put(tree) if self._is_default_device else super().replicate(tree)

    def lay_out(self, state: PyTree) -> PyTree:
        if self._is_default_device:
            # What lies on devices would stay where it is, but looking at each leaf takes longer than a small step.
            on_device = all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
            return state if on_device else jax.device_put(state)
        self._layout.check(state.params)
        return self._put(state, self._layout.shardings(state))

    def hold(self, tree: PyTree) -> PyTree:
        if not self._is_default_device:
            return self._put(tree, self._layout.shardings(tree))
        # A program for arrays that are tied to a device is another program than one for free ones.
        return jax.device_put(jax.tree.map(_freed, tree))

    def shardings(self, state: PyTree) -> PyTree:
        if self._is_default_device:
            return jax.tree.map(lambda leaf: SingleDeviceSharding(self.devices[0]), state)
        return self._layout.shardings(state)

    def describe(self) -> str:
        axes = ", ".join(
            f"{name}={size}" for name, size in self.mesh.shape.items() if size > 1 or name == "data"
        )
        return f"{axes} on {self.devices[0].platform}"

    def _constrain(self, role: Role, tree: PyTree) -> PyTree:
        if role is Role.ROWS:
            shardings = jax.tree.map(self._rows_sharding, tree)
        elif role is Role.STATE:
            if isinstance(tree, TrainState):
                self._layout.check(tree.params)
            shardings = self._layout.shardings(tree)
        else:
            shardings = self._whole
        return jax.lax.with_sharding_constraint(tree, shardings)

    @functools.cached_property
    def _layout(self) -> Layout:
        return Layout(self.mesh, self._rules)

    @functools.cached_property
    def _is_default_device(self) -> bool:
        return len(self.devices) == 1 and self.devices[0] == jax.local_devices()[0]

    def _sharding_of(self, shape: tuple[int, ...]) -> NamedSharding:
        # What does not divide is held whole by each device: the same numbers, at the price of the division.
        return self._divided if shape and shape[0] % self.shards == 0 else self._whole


def _freed(leaf: Any) -> Any:
    return (
        jax.device_get(leaf) if isinstance(leaf, jax.Array) and leaf.committed and not is_key(leaf) else leaf
    )
