"""`Prepared`, a step ready to run on the batches of one source. Owns no compilation."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from trainkit._calls.calls import Calls
from trainkit._core.typing import PyTree
from trainkit._feed.feed import Feed
from trainkit.metrics._accumulator import Accumulator


class Prepared(NamedTuple):
    """A step ready to run on the batches of one source.

    Attributes:
        step: the compiled step.
        accumulator: of the metrics it carries.
        empty: what the carried metrics start from, on the devices.
        feed: places the batches.
        calls: dispatches training steps, one or several at a time.
        probed: the training step that returns the values of probes as well, None where there are none.
        batches: what the feed takes in place of the batches of the source.
    """

    step: Callable[..., Any]
    accumulator: Accumulator
    empty: PyTree
    feed: Feed
    calls: Calls
    probed: Callable[..., Any] | None = None
    batches: Iterator[Any] | None = None
