"""What of a run is neither train state nor place: its logs, its metrics and what its callbacks remember.

Owns that these are saved together and set back together; not when.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from trainkit._core.history import History
from trainkit._core.typing import PyTree
from trainkit._loop.train_metrics import Reader, TrainMetrics
from trainkit._resume.saved import Saved
from trainkit.callbacks._callback import Callback
from trainkit.writers._attributed import Attributed, Ledger
from trainkit.writers._writer import MetricWriter

_LOG = logging.getLogger("trainkit")


class Record:
    """The callbacks of one fit with what each reads and writes.

    Attributes:
        history: every scalar logged.

    Args:
        callbacks: in the order given.
        writer: of the fit.
        history: of the trainer.
        metrics: of the fit.
    """

    def __init__(
        self, callbacks: Sequence[Callback], writer: MetricWriter, history: History, metrics: TrainMetrics
    ) -> None:
        self._callbacks, self.history, self._metrics = callbacks, history, metrics
        self._names = {id(c): name for c, name in zip(callbacks, _owners(callbacks), strict=True)}
        self._writer, self._ledger = writer, Ledger()
        self._writers = {key: Attributed(writer, name, self._ledger) for key, name in self._names.items()}
        self._readers = {key: metrics.reader(name) for key, name in self._names.items()}

    def writer(self, callback: Callback) -> MetricWriter:
        """Returns where `callback` writes."""
        return self._writers[id(callback)]

    def reader(self, callback: Callback) -> Reader:
        """Returns what `callback` has not yet seen of the training metrics."""
        return self._readers[id(callback)]

    def state(self, step: int) -> dict[str, Any]:
        """Returns the part of `Saved` that this is, after `step`."""
        # First what callbacks remember: in telling it, they write what they were still to write.
        callbacks = {
            self._names[id(callback)]: callback.state_dict()
            for callback in self._callbacks
            if callback.implements("state_dict")
        }
        self._writer.flush()
        return {
            "callbacks": callbacks,
            "metrics": self._metrics.state_dict(),
            "history": self.history.state_dict(),
            "written": tuple(self._ledger.names(step)),
        }

    def take_back(
        self, saved: Saved, replicate: Callable[[PyTree], PyTree], *, without: Callback | None = None
    ) -> None:
        """Sets logs, metrics and callbacks back to where they were, all but the callback `without`.

        Args:
            saved: where they were.
            replicate: puts the running metrics on the devices.
            without: a callback that keeps what it remembers.
        """
        if saved.came_to is None:  # else the logs keep what came after the step that the run went back to
            self._writer.rewind(saved.step, saved.written)
        # The names at that step too: all that stood there when it was saved is noted anew.
        self._ledger.rewind(saved.step - 1)
        if saved.written:
            self._ledger.note("the run before it was resumed", saved.step, saved.written)
        self.history.load_state_dict(saved.history)
        self._metrics.load_state_dict(saved.metrics, replicate)
        for callback in self._callbacks:
            name = self._names[id(callback)]
            if callback.implements("load_state_dict") and callback is not without:
                if name in saved.callbacks:
                    callback.load_state_dict(saved.callbacks[name])
                else:
                    _LOG.warning("%s is not in the checkpoint and begins afresh.", name)


def _owners(callbacks: Sequence[Callback]) -> list[str]:
    """Returns a name for each callback in messages about what it writes; its place tells apart those of one class."""
    classes = [type(callback).__name__ for callback in callbacks]
    return [
        name if classes.count(name) == 1 else f"{name} (number {index} of the callbacks)"
        for index, name in enumerate(classes, start=1)
    ]
