"""What may be asked of a train state at any moment: evaluations, predictions, functions of the model.

Owns neither the passes nor the choice of weights, nor whose state it is.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import clu.metrics
import jax

from trainkit._core.layer import Layer
from trainkit._core.state import TrainState
from trainkit._core.typing import PyTree
from trainkit._engine.engine import Engine
from trainkit._engine.layers import layers_of
from trainkit._engine.measuring import measuring
from trainkit._loop.evaluate import evaluate, predict
from trainkit._loop.predictions import predict_into
from trainkit._loop.weights import weighted
from trainkit.data._source import Source, as_source
from trainkit.data._take import take


class Questions:
    """Answers for the state of the moment.

    Args:
        engine: of the trainer.
        state: returns the train state; nothing that it returned is kept.
        timed: counts what happens within for a part of the fit.
    """

    def __init__(
        self,
        engine: Engine,
        state: Callable[[], TrainState],
        timed: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._engine, self._state, self._timed = engine, state, timed

    def evaluate(
        self,
        data: Any,
        *,
        weights: str = "averaged",
        limit: int | None = None,
        metrics: type[clu.metrics.Collection] | None = None,
    ) -> dict[str, Any]:
        """Returns the metrics over one pass; of several sources by name, `<name>/<metric>`."""
        engine = self._engine if metrics is None else measuring(self._engine, metrics)
        units = self._engine.steps.units
        named = is_named(data) and not units
        found = eval_sources(data, units=units) if named else {"": self._source(data)}
        sources = {name: limited(source, limit) for name, source in found.items()}
        with self._timed("eval"):
            state, found = self.weighted(weights), {}
            for name, source in sources.items():
                values = evaluate(engine, state, source)
                assert values is not None  # nothing interrupts it here
                found |= {f"{name}/{metric}" if name else metric: value for metric, value in values.items()}
        return found

    def predict(
        self,
        data: Any,
        *,
        weights: str = "averaged",
        limit: int | None = None,
        out: str | os.PathLike[str] | None = None,
    ) -> PyTree:
        """Returns what `predict_step` gives for each example, in order, as NumPy arrays or maps of those in `out`."""
        source = limited(self._source(data), limit)
        with self._timed("eval"):
            state = self.weighted(weights)
            if out is not None:
                return predict_into(self._engine, state, source, out)
            return predict(self._engine, state, source)

    def apply(
        self,
        fn: Callable[..., Any],
        *args: Any,
        weights: str = "averaged",
        rng: jax.Array | int | None = None,
    ) -> PyTree:
        """Returns what `fn(bound module, *args)` gives, on the devices."""
        with self._timed("eval"):
            return self._engine.applied(self.weighted(weights), fn, args, rng)

    def layers(self) -> list[Layer]:
        """Returns the modules of the model with shapes, parameters and operations."""
        with self._timed("callbacks"):
            return layers_of(self._engine, self._state())

    def _source(self, data: Any) -> Source:
        return as_source(data, units=self._engine.steps.units).in_order()

    def weighted(self, weights: str) -> TrainState:
        """Returns the state with the weights of that name in place."""
        return weighted(self._engine, self._state(), weights)


def limited(source: Source, limit: int | None) -> Source:
    """Returns at most `limit` batches of each pass over `source`; all where it is None."""
    if limit is None:
        return source
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise ValueError(
            f"limit={limit!r}: must be an int of at least 1, batches of a pass, or None for all."
        )
    return take(source, limit)


def is_named(data: Any) -> bool:
    """Says whether `data` are sources by name, and not one batch."""
    return isinstance(data, Mapping) and not all(hasattr(value, "shape") for value in data.values())


def eval_sources(eval_data: Any, *, units: bool = False) -> dict[str, Source]:
    """Returns the evaluation sources by name; `units` as for `as_source`."""
    if eval_data is None:
        return {}
    if isinstance(eval_data, Mapping):
        return {eval_name(name): as_source(data, units=units).in_order() for name, data in eval_data.items()}
    return {"eval": as_source(eval_data, units=units).in_order()}


def eval_name(name: Any) -> str:
    """Returns `name`, refusing one that the log could not hold."""
    if not isinstance(name, str) or not name or name == "train" or "/" in name:
        raise ValueError(
            f"eval_data has the name {name!r}; names are non-empty strings without '/', and not 'train'. "
            "A mapping given as eval_data maps names to sources; wrap arrays in tk.data.Arrays."
        )
    return name
