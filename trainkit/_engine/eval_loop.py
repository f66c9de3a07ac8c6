"""Evaluation of light steps: many batches in one call, as a loop on the device.

Owns that loop and what it is given; not when it pays, which the engine says.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainkit._core.typing import Batch
from trainkit._feed.feed import Fed, Feed
from trainkit.data._batch import batch_size_of, rows_of
from trainkit.parallel._strategy import Strategy

# A call takes a few times what it costs the host to make it, and a signal need not wait long for its end.
_BATCHES = 32
_CALLS_IN_FLIGHT = 4


def looped(step: Callable[..., Any], rows: int, *, masked: bool) -> Callable[..., Any]:
    """Returns `step` for many batches one after another; traced.

    Args:
        step: `step(given, state, carry, batch, mask) -> (carry, collected)`, of which nothing is collected.
        rows: of a batch.
        masked: whether it takes a mask.

    Returns:
        `run(given, state, carry, batches, examples) -> (carry, {})`, of leaves `[batches * rows, ...]`, the first
        `examples` of them real: `int32[]`.
    """

    def run(
        given: Any, state: Any, carry: Any, batches: Batch, examples: jax.Array
    ) -> tuple[Any, dict[str, Any]]:
        def at(index: jax.Array, carry: Any) -> Any:
            first = index * rows
            batch = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, rows), batches)
            mask = jnp.arange(rows) < examples - first if masked else None
            return step(given, state, carry, batch, mask)[0]

        return jax.lax.fori_loop(0, -(-examples // rows), at, carry), {}

    return run


class LoopedFeed(Feed):
    """Places what `looped` takes: the examples of many batches at a time, filled up to those of one call.

    Attributes:
        examples: of a call.

    Args:
        strategy: where to place.
        rows: of a batch.
    """

    def __init__(self, strategy: Strategy, rows: int) -> None:
        self._batch, self.examples = rows, _BATCHES * rows
        super().__init__(strategy, rows=self.examples, may_be_partial=True, exact=True, what="evaluation")

    @property
    def in_flight(self) -> int | None:
        """As `Feed.in_flight`."""
        return _CALLS_IN_FLIGHT

    def place(self, batch: Any) -> Fed:
        """Returns the examples on the devices, with their number in place of a mask."""
        return self._numbered(super().place(batch))

    def twice(self, batch: Any) -> tuple[Fed, Fed]:
        """As `Feed.twice`, of the last batch alone."""
        real = batch_size_of(batch)
        one, two = super().twice(rows_of(batch, real - real % self._batch, real))
        return self._numbered(one), self._numbered(two)

    def _numbered(self, fed: Fed) -> Fed:
        return fed._replace(mask=np.int32(fed.real), batches=-(-fed.real // self._batch))

    def _tell(self, batch: Any, real: int) -> None:
        if self.on_padding is not None and real % self._batch:
            self.on_padding(batch)
