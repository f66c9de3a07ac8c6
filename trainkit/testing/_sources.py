"""The proof of a source. Owns what is promised of one."""

import itertools
from collections.abc import Callable

from trainkit._core.tree import differences, signature
from trainkit._core.typing import Batch
from trainkit._feed.leaves import parted
from trainkit.data._batch import batch_size_of, check_batch, owned
from trainkit.data._source import Source, as_source
from trainkit.testing._promises import equal, holds, promised, same_batches

# Batches read of a source that may be endless.
_MOST = 32


def check_source(make: Callable[[], Source], *, may_reuse: bool = False) -> None:
    """Proves that a source yields what it says, and the same from every position.

    At most 32 batches of an epoch are read. It finds sources that fill the same buffers with batch after batch. A
    trainer takes these as well, and copies each batch first; other programs that gather batches do not.

    Args:
        make: returns a new source, or other data that a trainer takes; two of them hold the same.
        may_reuse: whether the buffers of a batch may be filled again once the next is asked for; never where the
            source says `keeps_batches`.

    Raises:
        AssertionError: a promise is broken; says which, and at which epoch and batch.

    Example:
        >>> import numpy as np
        >>> check_source(lambda: Arrays({"x": np.arange(10)}, batch_size=4, shuffle=True))
    """
    source = as_source(make())
    epochs = []
    for epoch in (0, 1):
        with promised(f"batches({epoch}) yields batches of numbers with equal leading sizes"):
            epochs.append(_read(source, epoch, reused=may_reuse and not source.keeps_batches))
        _check_facts(source, epoch, epochs[-1])
    other = as_source(make())
    for epoch, batches in enumerate(epochs):
        same_batches(f"a source made anew yields the same epoch {epoch}", _read(other, epoch), batches)
        for start in range(len(batches) + 1):
            promise = f"batches({epoch}, start={start}) goes on as batches({epoch}) does from there"
            with promised(promise):
                left = itertools.islice(source.batches(epoch, start), len(batches) - start)
                rest = [owned(batch) for batch in left]
            same_batches(promise, rest, batches[start:])
    same_batches("epoch 0 is the same when it is asked for again", _read(source, 0), epochs[0])
    _check_together(source, epochs[0])
    _check_refused(source)


def _read(source: Source, epoch: int, *, reused: bool = True) -> list[Batch]:
    copies: list[Batch] = []
    given: Batch = None
    for index, batch in enumerate(itertools.islice(source.batches(epoch), _MOST)):
        if index and not reused:
            equal(
                f"a batch stays as it is once the next is asked for: batch {index - 1} of epoch {epoch} was "
                "written over (yield arrays of its own for every batch, or check with may_reuse=True)",
                given,
                copies[-1],
            )
        check_batch(parted(batch)[0])
        batch_size_of(batch)
        given = batch
        copies.append(owned(batch))
    return copies


def _check_facts(source: Source, epoch: int, batches: list[Batch]) -> None:
    sizes = [batch_size_of(batch) for batch in batches]
    holds(bool(sizes), f"an epoch yields at least one batch: epoch {epoch} yields none")
    holds(max(sizes) == sizes[0], f"the first batch is the largest: epoch {epoch} has the sizes {sizes}")
    if not source.may_be_partial:
        holds(min(sizes) == sizes[0], f"with may_be_partial=False batches are of one size: {sizes}")
    if source.batch_size is not None:
        holds(
            sizes[0] == source.batch_size,
            f"the first batch has batch_size={source.batch_size} rows: {sizes[0]}",
        )
    rows = [{name: value.split("[")[0] for name, value in signature(batch).items()} for batch in batches]
    for index, row in enumerate(rows):
        changed = differences(rows[0], row)
        holds(not changed, f"every batch has the same leaves and dtypes: batch {index}: {'; '.join(changed)}")
    if len(batches) == _MOST:
        return
    steps, examples = source.steps_per_epoch, source.num_examples
    holds(steps in (None, len(sizes)), f"steps_per_epoch={steps} is how many there are: {len(sizes)}")
    holds(examples in (None, sum(sizes)), f"num_examples={examples} is how many there are: {sum(sizes)}")


def _check_together(source: Source, batches: list[Batch]) -> None:
    # Evaluation may read a source in the middle of training on it.
    first, second = (map(owned, source.batches(0)) for _ in range(2))
    mixed = [batch for pair in zip(first, second, strict=False) for batch in pair][: 2 * len(batches)]
    expected = [batch for batch in batches for _ in range(2)]
    same_batches(
        "two iterators of one source do not disturb each other",
        mixed[: len(expected)],
        expected[: len(mixed)],
    )


def _check_refused(source: Source) -> None:
    for epoch, start in ((-1, 0), (0, -1)):
        try:
            next(iter(source.batches(epoch, start)), None)
        except ValueError:
            continue
        holds(False, f"batches({epoch}, {start}) is refused with a ValueError: it was taken")
