"""What a checkpoint holds of a run apart from the train state. Owns the record; not when it is made or read."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from trainkit._core.state import TrainState
from trainkit._resume.restore import arrays_of, is_plain, keys_of
from trainkit._version import __version__
from trainkit.checkpoint._encoding import decode, encode
from trainkit.checkpoint._store import Contents, Store


@dataclasses.dataclass(frozen=True)
class Saved:
    """Where a run stood between two steps.

    Attributes:
        step: updates completed.
        fit: number of the fit, counted from 1 over the run.
        first_step: updates completed when that fit began.
        first_epoch: passes completed when it began.
        epoch: passes begun.
        batch: batches of the running pass used; 0 between passes.
        rows: of a full batch, to which smaller ones are padded.
        evaluation_owed: whether an evaluation is due at this step that a signal broke off.
        epoch_end_owed: whether the pass is done and its end was not told.
        stopped_by: why the fit was over, None where it was not.
        choice: how steps were fused, as text; None where that was not chosen.
        callbacks: what each callback remembers, by its name.
        metrics: the training metrics accumulated.
        history: the scalars logged.
        written: the names written to the logs at this step.
        data: what of the source must be as it was inside a pass; see `Source.facts`.
        place: where the source stood, None where the number of batches says it; see `Stream`.
        came_to: the step at which the fit was over, where it went back to this one at its end; logs and history hold
            what is up to there. Else None.
    """

    step: int
    fit: int
    first_step: int
    first_epoch: int
    epoch: int
    batch: int
    rows: int
    evaluation_owed: bool
    epoch_end_owed: bool
    stopped_by: str | None
    choice: str | None
    callbacks: Mapping[str, Any]
    metrics: Mapping[str, Any]
    history: Mapping[str, Any]
    written: tuple[str, ...]
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    place: Mapping[str, Any] | None = None
    came_to: int | None = None


def contents_of(state: TrainState, saved: Saved, labels: Mapping[str, Any]) -> Contents:
    """Returns what is written to a checkpoint.

    Args:
        state: the train state.
        saved: the rest of the run.
        labels: JSON for lists of checkpoints: `scores`, `best` and the user's `metadata`.
    """
    arrays, spec = arrays_of(state)
    extra: dict[str, jax.Array | np.ndarray] = {}
    host = {
        field.name: encode(getattr(saved, field.name), extra, field.name)
        for field in dataclasses.fields(saved)
    }
    meta = {
        "step": saved.step,
        "time": time.time(),
        "versions": {"trainkit": __version__, "jax": jax.__version__},
        "arrays": spec,
        "plain": is_plain(state.variables),
        "keys": keys_of(state),
        **labels,
    }
    return Contents(arrays, extra, meta, host)


def load_saved(store: Store, step: int) -> Saved:
    """Returns what a checkpoint holds apart from the train state."""
    host, extra = store.load_host(step)
    return Saved(**{name: decode(value, extra) for name, value in host.items()})
