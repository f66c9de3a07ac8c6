"""`Mesh`: the loss sees the whole batch, whatever the devices."""

from collections.abc import Sequence
from typing import Any, final

import jax
import jax.numpy as jnp

from trainkit._core.typing import Batch, Device
from trainkit.parallel._layout import Rules
from trainkit.parallel._spmd import Spmd
from trainkit.parallel._strategy import Forward

BATCH_AXIS = "batch"
"""Name under which a layer may reduce over the batch, as in `nn.BatchNorm(axis_name="batch")`."""


@final
class Mesh(Spmd):
    """Data, fully sharded and tensor parallelism over a mesh of devices; with one device it is plain `jit`.

    The loss sees the whole batch, so batch statistics, losses and metrics are global by construction. A layer
    that names the axis `"batch"` (`nn.BatchNorm(axis_name="batch")`) finds one of size 1 bound.

    Args:
        data: int, parts of the batch; by default what `fsdp` and `tensor` leave of the devices.
        fsdp: int, parts of parameters, optimizer state and averages, which divide the batch too (ZeRO stage 3,
            Rajbhandari et al. 2020): each leaf is divided along its largest dimension that `fsdp` divides.
        tensor: int, size of the axis for tensor parallelism, used by `rules` and by `nn.with_partitioning`.
        rules: pairs of a regular expression, searched in the path of a parameter, and one axis name or None per
            dimension, e.g. `(r"mlp/up/kernel", (None, "tensor"))`; the first that matches counts.
        devices: the devices to use; all by default, those of other processes included.

    Raises:
        ValueError: the sizes do not multiply to the number of devices, or a rule matches nothing.

    Example:
        >>> Mesh(devices=jax.local_devices()[:1]).shards
        1
    """

    def __init__(
        self,
        *,
        data: int | None = None,
        fsdp: int = 1,
        tensor: int = 1,
        rules: Rules = (),
        devices: Sequence[Device] | None = None,
    ) -> None:
        super().__init__(sizes={"data": data, "fsdp": fsdp, "tensor": tensor}, rules=rules, devices=devices)

    @property
    def takes_units(self) -> bool:
        return True

    def example(self, batch: Batch) -> Batch:
        return batch

    def map_forward(self, forward: Forward) -> Forward:
        return bind_axis(forward, BATCH_AXIS)


def bind_axis(forward: Forward, name: str) -> Forward:
    """Returns `forward` with an axis of size 1 bound by `name`, so that reductions over it are the identity."""

    def bound(*args: Any) -> tuple[Any, Any, Any]:
        # Everything but the dummy is unmapped: the axis exists by name and costs nothing.
        in_axes = (0, *(None for _ in args))
        over_one = jax.vmap(lambda _, *inner: forward(*inner), in_axes=in_axes, out_axes=None, axis_name=name)
        return over_one(jnp.zeros(1), *args)

    return bound
