"""`Throughput`: how fast a fit trains, and where its time goes. Measures no time: the loop does."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from trainkit._core.cadence import Cadence, Every, as_cadence
from trainkit._core.tree import named_leaves
from trainkit._core.typing import Batch, Device
from trainkit.callbacks._callback import Callback
from trainkit.callbacks._info import Info
from trainkit.callbacks._peaks import peak_of

_EVERY = Every(steps=50)
_TRAINING = ("data", "step")
Counter = Callable[[Batch], Any]
"""Counts the items of a batch on the host."""


class _Begun(NamedTuple):
    """Where a window began."""

    steps: int
    examples: int
    items: dict[str, float]
    data: float
    step: float


class Throughput(Callback):
    """Writes how fast a fit trains, each time over the window since the last.

    The time of a window is that of its steps and of waiting for their data: compilation, evaluations, saving and
    callbacks are left out. Written are `throughput/steps_per_second`; `/examples_per_second`, real rows without
    padding, of all processes; `/<item>_per_second`; `/data_wait`, the share of the window in which the host waited for
    data; `/flops_per_second`, from XLA's count for the step; and `/mfu`, that over the peak of all devices, where it is
    known. The devices run on: what was dispatched before the last time is waited for, as by `LogMetrics`, and nothing
    else.

    It writes the seconds of each part of this fit so far too, `time/compile`, `/data`, `/step`, `/eval`, `/save`,
    `/callbacks` and `/other`: those of a step when the next is due, so that the last are those of the end of the fit,
    the parts of `FitResult.timing`. After a resume they, and the first window, count from there.

    Args:
        every: cadence.
        items: what else is counted, by name: a function of a batch as the source gave it, on the host, without padding,
            that returns a number; or the name of a leaf of it. Of a leaf of integers `[rows, ...]` with more than one
            dimension (token ids, pixels) the elements are counted; any other (a mask of bool, weights, a number for
            each row) is summed. Only with items does the host look at the batches at all.
        peak_flops: float > 0, FLOP/s of one device; None for that of a table by the kind of device, in bfloat16.

    Raises:
        TypeError: `every` is not a cadence, or `items` no mapping of names to functions and names; a function did not
            return a number.
        ValueError: `peak_flops` is out of range; at the first batch, where it has no leaf of a name, with those it has.

    Example:
        >>> callbacks = [Throughput(Every(steps=100), items={"tokens": lambda batch: batch["mask"].sum()})]
    """

    def __init__(
        self,
        every: Cadence = _EVERY,
        *,
        items: Mapping[str, Counter | str] | None = None,
        peak_flops: float | None = None,
    ) -> None:
        self.every = as_cadence(every, "every", comes=True)
        self._counters = _as_counters({} if items is None else items)
        if peak_flops is not None and not (
            isinstance(peak_flops, int | float)
            and not isinstance(peak_flops, bool)
            and 0 < peak_flops < math.inf
        ):
            raise ValueError(
                f"Throughput(peak_flops={peak_flops!r}): must be a positive finite number, FLOP/s of one device."
            )
        self._peak = peak_flops
        self._peak_of_all: float | None = None
        self._items = dict.fromkeys(self._counters, 0.0)
        self._begun: _Begun | None = None
        self._marker: Mapping[str, Any] = {}
        # The seconds of each part at a step, which are written when the next are due.
        self._times: tuple[int, dict[str, float]] | None = None
        self._last = self._end = -1

    def implements(self, hook: str) -> bool:
        return bool(self._counters) if hook == "_see_batch" else super().implements(hook)

    def on_fit_start(self, info: Info) -> None:
        self._begun, self._marker, self._peak_of_all = self._now(info), {}, None

    def _see_batch(self, batch: Batch) -> None:
        for name, count in self._counters.items():
            self._items[name] += count(batch)

    def on_step(self, info: Info) -> None:
        # Looked into, metrics wait for the steps that they are of: the host is never further ahead than one window.
        len(self._marker)
        self._marker = info.metrics
        now, begun = self._now(info), self._begun
        self._begun = now
        if begun is not None:
            rates = self._rates(begun, now, info)
            if rates:
                info.writer.write_scalars(
                    info.step, {f"throughput/{name}": rate for name, rate in rates.items()}
                )
        self._write_times(info)
        self._times = info.step, dict(info.timing)

    def on_fit_end(self, info: Info) -> None:
        if self._times is not None and self._times[0] == info.step:
            self._times = None
        self._write_times(info)
        self._end = info.step

    def _on_result(self, info: Info) -> None:
        if self._end > self._last:  # else no step was run since they were written
            self._times = self._end, dict(info.timing)
            self._write_times(info)

    def on_exception(self, info: Info, exc: BaseException) -> None:
        self._write_times(info)

    def close(self) -> None:
        self._begun, self._marker, self._times = None, {}, None

    def state_dict(self) -> dict[str, Any]:
        # What is not yet written is written by the run that goes on from here.
        return {} if self._times is None else {"step": self._times[0], "times": self._times[1]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._times, self._last = (state["step"], dict(state["times"])) if state else None, -1

    def reset(self) -> None:
        self.load_state_dict({})

    def _write_times(self, info: Info) -> None:
        if self._times is not None:
            (step, times), self._times = self._times, None
            self._last = step
            if times:
                info.writer.write_scalars(step, {f"time/{part}": seconds for part, seconds in times.items()})

    def _now(self, info: Info) -> _Begun:
        timing, work = info.timing, info.work
        data, step = (timing.get(part, 0.0) for part in _TRAINING)
        return _Begun(work.steps, work.examples, dict(self._items), data, step)

    def _rates(self, begun: _Begun, now: _Begun, info: Info) -> dict[str, float]:
        seconds = now.data + now.step - begun.data - begun.step
        if seconds <= 0:
            return {}
        steps_per_second = (now.steps - begun.steps) / seconds
        rates = {
            "steps_per_second": steps_per_second,
            "examples_per_second": (now.examples - begun.examples) / seconds,
            "data_wait": min(max((now.data - begun.data) / seconds, 0.0), 1.0),
        }
        for name, count in now.items.items():
            rates[f"{name}_per_second"] = (count - begun.items[name]) / seconds
        flops = info.step_flops
        if flops is not None:
            rates["flops_per_second"] = flops * steps_per_second
            if self._peak_of_all is None:
                self._peak_of_all = _peak_of_all(info, self._peak)
            if self._peak_of_all:
                rates["mfu"] = rates["flops_per_second"] / self._peak_of_all
        return rates


def _peak_of_all(info: Info, given: float | None) -> float:
    """Returns the peak of all devices that the state lies on, 0 where it is not known."""
    leaf = next((leaf for leaf in jax.tree.leaves(info.state.params) if isinstance(leaf, jax.Array)), None)
    devices: list[Device] = [] if leaf is None else list(leaf.sharding.device_set)
    return sum(given or peak_of(device.device_kind) or 0.0 for device in devices)


def _as_counters(items: Any) -> dict[str, Counter]:
    if not isinstance(items, Mapping):
        raise TypeError(
            f"Throughput(items={items!r}): expected names with a function of a batch or the name of a leaf, e.g. "
            "{'tokens': lambda batch: batch['mask'].sum()}."
        )
    counters: dict[str, Counter] = {}
    for name, item in items.items():
        if not (isinstance(name, str) and name and (callable(item) or isinstance(item, str))):
            raise TypeError(
                f"Throughput(items={{{name!r}: {item!r}}}): a name stands for a function of a batch, or for the name "
                "of a leaf of it."
            )
        if f"{name}_per_second" in ("steps_per_second", "examples_per_second", "flops_per_second"):
            raise ValueError(
                f"Throughput(items={{{name!r}: ...}}): {name}_per_second is written already; rename it."
            )
        counters[name] = _counter(name, item)
    return counters


def _counter(name: str, item: Counter | str) -> Counter:
    if isinstance(item, str):
        return lambda batch: _count_leaf(batch, item)

    def count(batch: Batch) -> float:
        found = item(batch)
        number = np.asarray(found)
        if number.ndim or number.dtype.kind not in "buif":
            raise TypeError(
                f"Throughput(items={{{name!r}: ...}}): the function must return a number, the items of a batch; got "
                f"{type(found).__name__} of shape {number.shape}."
            )
        return float(number)

    return count


def _count_leaf(batch: Batch, leaf: str) -> float:
    leaves = dict(named_leaves(batch))
    if leaf not in leaves:
        raise ValueError(
            f"Throughput(items=...): a batch has no leaf {leaf!r}; its leaves are {', '.join(leaves) or 'none'}."
        )
    values = np.asarray(leaves[leaf])
    return float(
        values.size if values.ndim > 1 and values.dtype.kind in "iu" else values.sum(dtype=np.float64)
    )
