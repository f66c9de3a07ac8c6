"""What a fit has cost so far, for callbacks that log it. Owns no count: it reads those of the loop."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from trainkit._feed.resident import Supply
from trainkit._loop.standing import Standing
from trainkit._loop.stopwatch import Stopwatch
from trainkit.callbacks._callback import Callback
from trainkit.callbacks._info import Work
from trainkit.data._batch import GlobalBatch


class Costs:
    """Answers what a fit has cost so far.

    Args:
        watch: where its time goes.
        standing: where it stands.
        flops: returns the operations of one step, None where they are not known.
    """

    def __init__(self, watch: Stopwatch, standing: Standing, flops: Callable[[], float | None]) -> None:
        self._watch, self._standing, self.step_flops = watch, standing, flops

    def timing(self) -> Mapping[str, float]:
        """Returns the seconds of each part."""
        return MappingProxyType(self._watch.read()[1])

    def work(self) -> Work:
        """Returns what the steps did."""
        return Work(self._standing.ran, self._standing.examples)


def show_batches(
    callbacks: Sequence[Callback], supply: Supply, group: int, watch: Stopwatch
) -> Callable[[Sequence[Any]], None] | None:
    """Returns what shows the batches of a call to callbacks, None where none looks at them.

    Args:
        callbacks: that look.
        supply: how batches get to the step.
        group: how many make one step.
        watch: where the time goes.
    """
    if not callbacks:
        return None

    def show(taken: Sequence[Any]) -> None:
        begun = watch.clock()
        for handed in taken:
            for one in handed if group > 1 else (handed,):
                batch = one.read(0, one.size) if isinstance(one, GlobalBatch) else supply.read(one)
                for callback in callbacks:
                    callback._see_batch(batch)
        watch.move(watch.clock() - begun, "callbacks")

    return show
