"""Training metrics between two looks at them: cut on the device, merged on the host in float64.

The step accumulates into one packed value. Whoever asks for metrics cuts it: the value so far becomes a
segment, its copy to the host starts, and the step goes on from empty. Nothing here waits for a device until a
value is read. Owns the segments; not the cadence at which somebody asks.
"""

import collections
import functools
import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from trainkit._core.tree import begin_fetch, describe
from trainkit._core.typing import PyTree
from trainkit.metrics._accumulator import Accumulator
from trainkit.metrics._packing import Packed

_LOG = logging.getLogger("trainkit")
# Below this many segments a reader keeps them as they are; above it, the old ones are merged on the host.
_MOST_SEGMENTS = 64


class Window(Mapping[str, Any]):
    """Metrics of a range of steps by full name; the first look into it waits for the devices."""

    def __init__(self, compute: Callable[[], dict[str, Any]]) -> None:
        self._compute = compute

    @functools.cached_property
    def _values(self) -> dict[str, Any]:
        return dict(read_only(self._compute()))

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            raise KeyError(f"no metric {name!r} here; the names are {', '.join(self._values) or 'none'}")
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(self._values)


def read_only(metrics: dict[str, Any]) -> Mapping[str, Any]:
    """Returns a view of `metrics` through which nothing can be changed, arrays included."""
    for value in metrics.values():
        if isinstance(value, np.ndarray):
            value.flags.writeable = False
    return MappingProxyType(metrics)


NO_METRICS = Window(dict)
"""Where there is nothing to tell."""


class Segment:
    """What the step accumulated between two cuts, read once for all readers."""

    def __init__(self, accumulator: Accumulator, packed: Packed, wait: Callable[[PyTree], None]) -> None:
        self._accumulator, self.packed, self._wait = accumulator, packed, wait

    @functools.cached_property
    def metrics(self) -> Any:
        """The metrics on the host; the first look waits for the devices."""
        self._wait(self.packed)
        return self._accumulator.unpack(self.packed)


class Merger:
    """Merges segments on the host, once for all readers that ask for the same."""

    def __init__(self, accumulator: Accumulator) -> None:
        self.accumulator = accumulator
        self._done: collections.deque[tuple[Sequence[Segment], Any, Any]] = collections.deque(maxlen=2)

    def __call__(self, segments: Sequence[Segment], start: Any) -> Any:
        """Returns `start`, None for nothing, and then the segments, merged."""
        for known, begun, merged in self._done:
            if begun is start and len(known) == len(segments) and all(map(operator.is_, known, segments)):
                return merged
        merged = self.accumulator.merge([segment.metrics for segment in segments], start)
        self._done.append((segments, start, merged))
        return merged


class Reader:
    """What one reader has not yet seen: segments, the oldest merged on the host."""

    def __init__(self, merge: Merger) -> None:
        self._merge = merge
        self._merged: Any = None
        self._segments: list[Segment] = []

    def add(self, segment: Segment) -> None:
        """Appends a segment; keeps the number of them bounded."""
        self._segments.append(segment)
        if len(self._segments) >= _MOST_SEGMENTS:
            old, self._segments = self._segments[: _MOST_SEGMENTS // 2], self._segments[_MOST_SEGMENTS // 2 :]
            self._merged = self._merge(old, self._merged)

    def state_dict(self, index: Callable[[Segment], int]) -> dict[str, Any]:
        """Returns what is not yet seen; `index` numbers the segments, which readers share."""
        merged = (
            None if self._merged is None else [np.asarray(leaf) for leaf in jax.tree.leaves(self._merged)]
        )
        return {"merged": merged, "segments": [index(segment) for segment in self._segments]}

    def load_state_dict(self, state: Mapping[str, Any], segments: Sequence[Segment]) -> None:
        """Takes back what `state_dict` returned, given the segments by their numbers."""
        self._merged, self._segments = None, [segments[number] for number in state["segments"]]
        if state["merged"] is not None:
            self._merged = jax.tree.structure(self._merge.accumulator.merge([])).unflatten(state["merged"])

    def take(self) -> Window:
        """Returns what came since the last call, and forgets it."""
        merge, merged, segments = self._merge, self._merged, self._segments
        self._merged, self._segments = None, []
        if merged is None and not segments:
            return NO_METRICS

        def compute() -> dict[str, Any]:
            found = merge(segments, merged)
            values, without = merge.accumulator.compute(found), merge.accumulator.weightless(found)
            return {f"train/{name}": value for name, value in values.items() if name not in without}

        return Window(compute)


class TrainMetrics:
    """The packed value that the step carries, and the readers who see it in segments.

    Attributes:
        packed: what the next step takes; the loop puts the step's result back here before anyone may look.

    Args:
        accumulator: of the metrics.
        empty: what they start from.
        wait: waits for arrays of the steps.
    """

    def __init__(
        self,
        accumulator: Accumulator,
        empty: PyTree,
        wait: Callable[[PyTree], None] = jax.block_until_ready,
    ) -> None:
        self._merge, self._empty, self._wait = Merger(accumulator), empty, wait
        self._readers: dict[str, Reader] = {}
        self.packed = empty

    def reader(self, name: str) -> Reader:
        """Returns a reader of all steps from now on; `name` is its own in a checkpoint."""
        self._readers[name] = Reader(self._merge)
        return self._readers[name]

    def clear(self) -> None:
        """Forgets all that was accumulated."""
        self.packed = self._empty
        for reader in self._readers.values():
            reader.take()

    def cut(self) -> None:
        """Ends the running segment, hands it to the readers and starts its copy to the host."""
        if self.packed is self._empty:
            return
        begin_fetch(self.packed)
        segment = Segment(self._merge.accumulator, self.packed, self._wait)
        for reader in self._readers.values():
            reader.add(segment)
        self.packed = self._empty

    def state_dict(self) -> dict[str, Any]:
        """Returns all that was accumulated and not yet seen by every reader, as NumPy arrays; waits for devices.

        Nothing is cut: a run that looks here goes on as one that does not.
        """
        segments: dict[int, Segment] = {}
        numbers: dict[int, int] = {}

        def index(segment: Segment) -> int:
            segments[id(segment)] = segment
            return numbers.setdefault(id(segment), len(numbers))

        readers = {name: reader.state_dict(index) for name, reader in self._readers.items()}
        return {
            "spec": [describe(part) for part in self._empty],
            "packed": None if self.packed is self._empty else [np.asarray(part) for part in self.packed],
            # One array for each part of a segment: there may be many segments.
            "segments": [
                np.stack(parts) for parts in zip(*(one.packed for one in segments.values()), strict=True)
            ],
            "readers": readers,
        }

    def load_state_dict(self, state: Mapping[str, Any], place: Callable[[PyTree], PyTree]) -> None:
        """Takes back what `state_dict` returned; `place` puts the packed value on the devices.

        Where the metrics are others than then, what they had accumulated is lost, and said so.
        """
        if state["spec"] != [describe(part) for part in self._empty]:
            _LOG.warning(
                "the metrics are others than those of the checkpoint: the values logged next leave out the "
                "steps before it."
            )
            return
        self.packed = self._empty if state["packed"] is None else place(tuple(state["packed"]))
        parts = zip(*state["segments"], strict=True)
        segments = [Segment(self._merge.accumulator, part, self._wait) for part in parts]
        for name in self._readers.keys() & state["readers"].keys():
            self._readers[name].load_state_dict(state["readers"][name], segments)
