"""The sources for the kinds of data in use.

Owns `as_source` and the replaying of sources that can't seek. Does not hold arrays (`Arrays` does), check batches,
or move them to devices.
"""

import inspect
import itertools
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, final, runtime_checkable

from trainkit._core.tree import named_leaves
from trainkit._core.typing import Batch, Clock
from trainkit.data._base import Source
from trainkit.data._batch import batch_size_of, check_batch, stays_on_host
from trainkit.data._stateful import stateful
from trainkit.data._tensors import is_array, to_host
from trainkit.data._units import Units

_logger = logging.getLogger("trainkit")

_ACCEPTED = (
    "a tk.data.Arrays or another tk.data.Source, a Grain dataset or loader, a tf.data.Dataset, a torch "
    "DataLoader, a list of batches or any other iterable of them, or a function that returns an iterator "
    "of batches"
)


def as_source(data: Any, *, clock: Clock = time.monotonic, units: bool = False) -> Source:
    """Returns a `Source` for any data a trainer accepts.

    Tensors of TensorFlow and torch become NumPy arrays. A list of batches and a Grain `MapDataset` seek; the
    other kinds are replayed up to a position, which is exact only when they yield the same batches again. A
    Grain `MapDataset` is read in the calling thread, epoch after epoch, so that its shuffle differs between
    epochs; the sampler of a torch loader is told the epoch when it has `set_epoch`.

    Args:
        data: a `Source`, a Grain dataset or loader, a `tf.data.Dataset`, a torch `DataLoader`, an iterable of
            batches, or a function returning an iterator of them, which is called for every epoch (with its
            number, when it takes an argument). An iterator serves one epoch.
        clock: returns seconds; times the replaying.
        units: whether a batch is one unit (`batch_axis = None`), which has no rows to be counted.

    Raises:
        TypeError: `data` is none of these, or is a single batch.
        ValueError: a list of batches is empty or holds something that is not a batch.

    Example:
        >>> import numpy as np
        >>> source = as_source([np.zeros((4, 2)), np.ones((3, 2))])
        >>> source.steps_per_epoch, source.num_examples, source.may_be_partial
        (2, 7, True)
    """
    if units:
        return data if isinstance(data, Units) else Units(_units_of(data, clock))
    if isinstance(data, Source):
        return data
    _refuse_single_batch(data)
    if isinstance(data, (list, tuple)):
        return _listed(data)
    if isinstance(data, _GrainMap):
        return _indexed_grain(data)
    if isinstance(data, Iterator):
        return _Replayed(_once(data), type(data).__name__, clock, of=data)
    if isinstance(data, _TorchLoader):
        return _torch(data, clock)
    if isinstance(data, Iterable):
        name, steps = type(data).__name__, _length(data)
        return _Replayed(lambda epoch: iter(data), name, clock, steps=steps, of=data)
    if callable(data):
        return _Replayed(_called(data), getattr(data, "__name__", type(data).__name__), clock)
    raise TypeError(f"A {type(data).__name__} is not a source of batches. Give {_ACCEPTED}.")


@runtime_checkable
class _GrainMap(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def to_iter_dataset(self) -> Any: ...


@runtime_checkable
class _TfDataset(Protocol):
    def cardinality(self) -> Any: ...

    def as_numpy_iterator(self) -> Any: ...


@runtime_checkable
class _TorchLoader(Protocol):
    dataset: Any
    batch_size: int | None
    drop_last: bool
    sampler: Any

    def __iter__(self) -> Iterator[Any]: ...


@runtime_checkable
class _EpochSampler(Protocol):
    def set_epoch(self, epoch: int) -> None: ...


@final
class _Indexed(Source):
    """Batches that are fetched by epoch and index."""

    def __init__(
        self,
        fetch: Callable[[int, int], Batch],
        steps: int | None,
        *,
        batch_size: int | None = None,
        num_examples: int | None = None,
        may_be_partial: bool = True,
        keeps_batches: bool = False,
    ) -> None:
        self._fetch = fetch
        self.keeps_batches = keeps_batches
        self.steps_per_epoch = steps
        self.batch_size = batch_size
        self.num_examples = num_examples
        self.may_be_partial = may_be_partial
        self.seekable = True
        self.endless = steps is None

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        self.check_position(epoch, start)
        steps = self.steps_per_epoch
        indices = itertools.count(start) if steps is None else range(start, steps)
        return (self._fetch(epoch, index) for index in indices)


@final
class _Replayed(Source):
    """Batches that are read in order from an iterator opened for every epoch."""

    def __init__(
        self,
        open_epoch: Callable[[int], Iterator[Any]],
        name: str,
        clock: Clock,
        *,
        steps: int | None = None,
        batch_size: int | None = None,
        may_be_partial: bool = True,
        of: Any = None,
    ) -> None:
        # An iterator is its own pass, and is at its end where that is.
        self._loader = None if isinstance(of, Iterator) else stateful(of)
        self.endless = _is_endless(of)
        self._open = open_epoch
        self._name = name
        self._clock = clock
        self._announced = False
        self.steps_per_epoch = steps
        self.batch_size = batch_size
        self.may_be_partial = may_be_partial

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        self.check_position(epoch, start)

        def open_pass() -> Iterator[Any]:
            iterator = self._open(epoch)
            if start:
                self._skip(iterator, start)
            return iterator

        nothing = f"The source ({self._name}) yielded no batch in epoch {epoch}. It must yield one."
        return _Pass(open_pass, None if start else nothing)

    def position(self, batches: Iterator[Batch]) -> Any:
        assert isinstance(batches, _Pass)
        if self._loader is not None:
            return self._loader.get()
        known = None if batches.ended else stateful(batches.iterator)
        return None if known is None else known.get()

    def batches_at(self, epoch: int, position: Any) -> Iterator[Batch]:
        def open_pass() -> Iterator[Any]:
            if self._loader is not None:
                self._loader.set(position)
                return self._open(epoch)
            iterator = self._open(epoch)
            known = stateful(iterator)
            if known is None:
                raise ValueError(
                    f"The run was saved with data that know their position; the source ({self._name}) has no "
                    "set_state or load_state_dict. A run is continued on the data it was started with."
                )
            known.set(position)
            return iterator

        return _Pass(open_pass, None)

    def _skip(self, iterator: Iterator[Any], start: int) -> None:
        begun = self._clock()
        skipped = sum(1 for _ in itertools.islice(iterator, start))
        if skipped < start:
            raise ValueError(
                f"The source ({self._name}) ended after {skipped} batches, before batch {start} was reached. "
                "A run is continued on the data it was started with."
            )
        if not self._announced:
            self._announced = True
            _logger.warning(
                "The source (%s) can't seek: reading past its first %d batches took %.1f s. The position is "
                "exact only if they are the same batches again. tk.data.Arrays and a Grain MapDataset can "
                "seek.",
                self._name,
                start,
                self._clock() - begun,
            )


@final
class _Pass(Iterator[Batch]):
    """One pass over an iterator that is opened when its first batch is asked for.

    Attributes:
        iterator: None before that.
        ended: whether it has no more.

    Args:
        open_pass: returns the iterator.
        nothing: the message where it yields nothing; None where that is no error.
    """

    def __init__(self, open_pass: Callable[[], Iterator[Any]], nothing: str | None) -> None:
        self._open, self._nothing = open_pass, nothing
        self.iterator: Iterator[Any] | None = None
        self.ended = False

    def __next__(self) -> Batch:
        if self.iterator is None:
            self.iterator = self._open()
        try:
            batch = next(self.iterator)
        except StopIteration:
            self.ended = True
            if self._nothing is not None:
                raise ValueError(self._nothing) from None
            raise
        self._nothing = None
        return to_host(batch)


def _units_of(data: Any, clock: Clock) -> Source:
    if not isinstance(data, list) or not data:
        return as_source(data, clock=clock)
    units = [to_host(unit) for unit in data]
    for unit in units:
        check_batch(unit)
    return _Indexed(lambda epoch, index: units[index], len(units), keeps_batches=True)


def _listed(data: Sequence[Any]) -> Source:
    if not data:
        raise ValueError(
            f"An empty {type(data).__name__} of batches was given. There must be at least one batch."
        )
    batches = [to_host(batch) for batch in data]
    sizes = [_checked_size(index, batch) for index, batch in enumerate(batches)]
    return _Indexed(
        lambda epoch, index: batches[index],
        len(batches),
        batch_size=max(sizes),
        num_examples=sum(sizes),
        may_be_partial=min(sizes) < max(sizes),
        keeps_batches=True,
    )


def _checked_size(index: int, batch: Batch) -> int:
    try:
        taken = [one for one in named_leaves(batch) if not stays_on_host(one[1])]
        check_batch(dict(taken) or batch)
        return batch_size_of(batch)
    except (TypeError, ValueError) as error:
        raise type(error)(f"Batch {index} of the list: {error}") from None


def _indexed_grain(data: _GrainMap) -> Source:
    steps = _length(data)
    if steps == 0:
        raise ValueError("An empty Grain dataset was given. There must be at least one batch.")

    def fetch(epoch: int, index: int) -> Batch:
        # Grain reshuffles for every pass over the length, so a pass must be asked for by its index.
        batch = data[index if steps is None else epoch * steps + index]
        if batch is None:
            raise ValueError(
                f"The Grain dataset has no element {index}: a filter after `batch` removed it. Filter "
                "examples before batching, or give `dataset.to_iter_dataset()`."
            )
        return to_host(batch)

    return _Indexed(fetch, steps)


def _torch(loader: _TorchLoader, clock: Clock) -> Source:
    def open_epoch(epoch: int) -> Iterator[Any]:
        if isinstance(loader.sampler, _EpochSampler):
            loader.sampler.set_epoch(epoch)
        return iter(loader)

    return _Replayed(
        open_epoch,
        type(loader).__name__,
        clock,
        steps=_length(loader),
        batch_size=loader.batch_size,
        may_be_partial=not (loader.batch_size and loader.drop_last),
        of=loader,
    )


def _once(iterator: Iterator[Any]) -> Callable[[int], Iterator[Any]]:
    unread = [iterator]

    def open_epoch(epoch: int) -> Iterator[Any]:
        if not unread:
            raise ValueError(
                f"The source is a {type(iterator).__name__}, which can be passed over once, and epoch "
                f"{epoch} needs it again. Give a list of batches, or a function that returns a new iterator."
            )
        return unread.pop()

    return open_epoch


def _called(function: Callable[..., Any]) -> Callable[[int], Iterator[Any]]:
    call = _with_epoch(function)

    def open_epoch(epoch: int) -> Iterator[Any]:
        result = call(epoch)
        _refuse_single_batch(result)
        if not isinstance(result, Iterable):
            raise TypeError(
                f"The source function returned a {type(result).__name__}. It must return an iterator "
                "of batches."
            )
        return iter(result)

    return open_epoch


def _with_epoch(function: Callable[..., Any]) -> Callable[[int], Any]:
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:
        return lambda epoch: function()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p.name for p in parameters.values() if p.default is p.empty and p.kind not in variadic]
    if "epoch" in parameters and required in ([], ["epoch"]):
        return lambda epoch: function(epoch=epoch)
    if len(required) > 1:
        raise TypeError(
            f"The source function requires the arguments {required}. It may take none, or one: the epoch."
        )
    return function if required else lambda epoch: function()


def _refuse_single_batch(data: Any) -> None:
    of_arrays = isinstance(data, tuple) and any(is_array(leaf) for leaf in data)
    if isinstance(data, (Mapping, str, bytes)) or is_array(data) or of_arrays:
        kind = f"{type(data).__name__} of arrays" if of_arrays else type(data).__name__
        raise TypeError(
            f"A {kind} was given as the source: that is one batch or the arrays to cut batches from. Wrap "
            "it: [batch] for one batch, tk.data.Arrays(arrays, batch_size=...) for arrays."
        )


def _is_endless(data: Any) -> bool:
    # TensorFlow's name for it is tf.data.INFINITE_CARDINALITY.
    return isinstance(data, _TfDataset) and int(data.cardinality()) == -1


def _length(data: Any) -> int | None:
    if isinstance(data, _TfDataset):
        cardinality = int(data.cardinality())
        return cardinality if cardinality >= 0 else None
    try:
        length = len(data)
    except TypeError:
        return None
    # An endless Grain dataset says sys.maxsize.
    return length if length < sys.maxsize else None
