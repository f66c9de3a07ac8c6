"""Batch statistics over a whole source: mean and variance pooled over one pass. Owns the pass and the sums."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from trainkit._core.state import TrainState, with_raw_key
from trainkit._core.typing import PyTree
from trainkit._engine.engine import Engine
from trainkit._loop.evaluate import Fetching, peek
from trainkit._step.checks import explained_errors
from trainkit.data._source import Source


def pooled_statistics(
    engine: Engine, state: TrainState, source: Source, interrupted: Callable[[int, PyTree], bool]
) -> PyTree | None:
    """Returns `state.batch_stats` with the statistics of all examples of `source`, in NumPy arrays.

    Each layer of batch normalisation has the mean and the variance of what it saw over the whole pass: those of the
    batches are pooled, weighted by examples, in float64. Layers see what they see in training, normalised by batches,
    without dropout. What belongs to other layers stays. None where `interrupted` said so.

    Args:
        engine: of the trainer.
        state: its parameters are those that the statistics are for.
        source: passed over once, in its order.
        interrupted: given how many batches were passed over, and what the last call returns.

    Raises:
        ValueError: the source is empty, or no layer takes statistics of a batch.
    """
    source = source.in_order()
    first, batches, _ = peek(engine, source)
    step, feed = engine.prepare_statistics(state, source, first)
    raw, pool = with_raw_key(state.replace(opt_state=(), hooks={})), _Pool()
    fetching, sizes, running = Fetching(engine), [], None
    for number, batch in enumerate(batches):
        if interrupted(number, running):
            return None
        fed = feed.place(batch)
        with explained_errors():
            running = step(raw, fed.batch, fed.mask)
        fetching.add(running, None)
        sizes.append(fed.real)
        for measured in fetching.take():
            pool.add(measured, sizes.pop(0))
    for measured, size in zip(fetching.all(), sizes, strict=True):
        pool.add(measured, size)
    if not pool.layers:
        raise ValueError(
            "SWA(refresh=...) estimates batch statistics anew, and no nn.BatchNorm of the model takes them from the "
            "batch in training: leave refresh out."
        )
    return _placed(state.batch_stats, pool.layers, ())


class _Pool:
    """Means and variances of examples that came in parts (Chan et al. 1979).

    Attributes:
        layers: `mean` and `var` in float64, by the path of the layer.
    """

    def __init__(self) -> None:
        self.layers: dict[str, dict[str, np.ndarray]] = {}
        self._examples = 0

    def add(self, measured: Mapping[str, Mapping[str, np.ndarray]], examples: int) -> None:
        before, self._examples = self._examples, self._examples + examples
        share = examples / self._examples
        for name, layer in measured.items():
            mean, var = (np.asarray(layer[key], np.float64) for key in ("mean", "var"))
            if before:
                old = self.layers[name]
                apart = mean - old["mean"]
                mean = old["mean"] + share * apart
                var = (1 - share) * old["var"] + share * var + share * (1 - share) * apart**2
            self.layers[name] = {"mean": mean, "var": var}


def _placed(tree: Any, layers: Mapping[str, Mapping[str, np.ndarray]], path: tuple[str, ...]) -> Any:
    """Returns the collection with the values of the layers, in its dtypes."""
    layer = layers.get("/".join(path), {})

    def value(key: str, old: Any) -> Any:
        if key in layer:
            return np.broadcast_to(layer[key], old.shape).astype(old.dtype)
        return _placed(old, layers, (*path, key)) if isinstance(old, Mapping) else old

    placed = {key: value(key, old) for key, old in tree.items()}
    return placed if type(tree) is dict else type(tree)(placed)
