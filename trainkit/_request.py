"""What a fit was asked to do, and where a trainer stands in its data. Owns no logic."""

import dataclasses
import pathlib
from collections.abc import Mapping

from trainkit._when import Cadence
from trainkit.callbacks._callback import Callback
from trainkit.data._source import Source


@dataclasses.dataclass
class Position:
    """Where a trainer stands in its data: kept between fits.

    Attributes:
        epoch: passes over the training source begun.
        batch: batches of the running pass already used; 0 between passes.
        rows: of a full batch, as far as is known: a pass gone on with at a smaller one pads it alike.
    """

    epoch: int = 0
    batch: int = 0
    rows: int = 0


@dataclasses.dataclass(frozen=True)
class Request:
    """What one fit was asked to do; exactly one of `epochs` and `steps` is given, `fit` is its number in the run."""

    fit: int
    source: Source
    epochs: int | None
    steps: int | None
    evaluations: Mapping[str, Source]
    eval_every: Cadence | None
    accumulate: int
    callbacks: tuple[Callback, ...]
    logdir: pathlib.Path | None
