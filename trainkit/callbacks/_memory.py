"""`Memory`: how much memory a fit holds, on the devices and on the host. Frees none."""

import math
import os
import pathlib
import resource
import sys

import jax

from trainkit._core.cadence import Cadence, Every, as_cadence
from trainkit._core.typing import Device
from trainkit.callbacks._callback import Callback
from trainkit.callbacks._info import Info

_EVERY = Every(steps=50)
_STATM = pathlib.Path("/proc/self/statm")


class Memory(Callback):
    """Writes the memory in use: `memory/device_bytes` and `memory/host_bytes`.

    Of several devices it is that of the fullest that belongs to this process, for that one runs out first.
    `memory/device_peak_bytes` is the most that was in use since the process began. A backend that tells neither, as the
    CPU's, is asked for the arrays that are alive: their bytes on the fullest device, without what a running step needs
    in between, and without a peak. On the host it is the resident memory of the process; where the system tells only
    its peak, as macOS, that. Nothing is waited for.

    Args:
        every: cadence.

    Raises:
        TypeError: `every` is not a cadence.

    Example:
        >>> callbacks = [Memory(Every(steps=100))]
    """

    def __init__(self, every: Cadence = _EVERY) -> None:
        self.every = as_cadence(every, "every", comes=True)

    def on_step(self, info: Info) -> None:
        devices = {
            device
            for leaf in jax.tree.leaves(info.state.params)
            if isinstance(leaf, jax.Array)
            for device in leaf.sharding.addressable_devices
        }
        found = {**_on_devices(devices), "host_bytes": _host_bytes()}
        info.writer.write_scalars(info.step, {f"memory/{name}": float(size) for name, size in found.items()})


def _on_devices(devices: set[Device]) -> dict[str, int]:
    told = [stats for device in devices if (stats := device.memory_stats())]
    used = [stats["bytes_in_use"] for stats in told if "bytes_in_use" in stats]
    if len(used) < len(devices):
        return {"device_bytes": max(_alive(devices).values(), default=0)}
    peaks = [stats["peak_bytes_in_use"] for stats in told if "peak_bytes_in_use" in stats]
    return {"device_bytes": max(used, default=0), **({"device_peak_bytes": max(peaks)} if peaks else {})}


def _alive(devices: set[Device]) -> dict[Device, int]:
    """Returns the bytes of the arrays that are alive, by device."""
    sizes = dict.fromkeys(devices, 0)
    for array in jax.live_arrays():
        if array.is_deleted():
            continue
        size = math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        for device in array.sharding.addressable_devices & devices:
            sizes[device] += size
    return sizes


def _host_bytes() -> int:
    """Returns the resident memory of this process; its peak where the system tells nothing else."""
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
