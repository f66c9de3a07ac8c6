"""What a checkpoint holds of a run apart from the train state. Owns the record; not when it is made or read."""

import dataclasses
import time
import types
import typing
from collections.abc import Container, Mapping
from typing import Any

import jax
import numpy as np

from trainkit._core.state import TrainState
from trainkit._resume.restore import arrays_of, is_plain, keys_of
from trainkit._version import __version__
from trainkit.checkpoint._encoding import decode, encode
from trainkit.checkpoint._reading import META, WEIGHTS_ONLY, are_arrays
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
        frozen: dtype, shape and a hash of each array of `Trainer(frozen=)`, by path.
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
    frozen: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def contents_of(
    state: TrainState, saved: Saved, labels: Mapping[str, Any], only: Container[str] | None = None
) -> Contents:
    """Returns what is written to a checkpoint.

    Args:
        state: the train state.
        saved: the rest of the run.
        labels: JSON for lists of checkpoints: `scores`, `best` and the user's `metadata`.
        only: path names of the arrays of a checkpoint of weights alone; None for all, and the run.
    """
    arrays, spec = arrays_of(state)
    if only is not None:
        arrays = {name: array for name, array in arrays.items() if name in only}
        spec = {name: one for name, one in spec.items() if name in only}
        saved = dataclasses.replace(saved, callbacks={}, metrics={}, history={}, place=None)
        labels = {**labels, WEIGHTS_ONLY: True}
    extra: dict[str, jax.Array | np.ndarray] = {}
    host = {
        field.name: encode(getattr(saved, field.name), extra, field.name)
        for field in dataclasses.fields(saved)
    }
    return Contents(arrays, extra, {**meta_of(state, spec, saved.step), **labels}, host)


def meta_of(state: TrainState, spec: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Returns what `Contents.meta` says of a train state, from which it can be restored.

    Args:
        state: the train state.
        spec: of its arrays, from `arrays_of`.
        step: updates completed.
    """
    return {
        "step": step,
        "time": time.time(),
        "versions": {"trainkit": __version__, "jax": jax.__version__},
        "arrays": spec,
        "plain": is_plain(state.variables),
        "keys": keys_of(state),
    }


def problems(store: Store, step: int) -> list[str]:
    """Returns what is wrong with a checkpoint of a run, one line each: with its files, then with what they say."""
    found = store.problems(step)
    if found:
        return found
    try:
        meta = store.meta(step)
        if not (are_arrays(meta.get("arrays")) and type(meta.get("plain")) is bool):
            return [f"{META}: does not say which arrays the state has"]
        # Of several processes one alone can't have Orbax read; they find out together, later.
        if jax.process_count() == 1:
            load_saved(store, step)
    except (OSError, ValueError) as error:
        return [str(error)]
    return []


def is_weights_only(store: Store, step: int) -> bool:
    """Says whether a checkpoint holds weights alone, and no run."""
    return bool(store.meta(step).get(WEIGHTS_ONLY))


def load_saved(store: Store, step: int) -> Saved:
    """Returns what a checkpoint holds apart from the train state.

    Raises:
        ValueError: it is not what `contents_of` writes; the message names the checkpoint.
    """
    host, extra = store.load_host(step)
    try:
        return _saved(host, extra)
    except ValueError as error:
        raise ValueError(
            f"the checkpoint of step {step} in {store.folder} is not as it was saved: {error}."
        ) from error


def _saved(host: Any, extra: Mapping[str, np.ndarray]) -> Saved:
    fields = {field.name: field for field in dataclasses.fields(Saved)}
    if not isinstance(host, dict) or host.keys() - fields.keys():
        raise ValueError("it has values that no run has")
    missing = [
        name for name, field in fields.items() if name not in host and field.default is field.default_factory
    ]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    values = {name: decode(value, extra) for name, value in host.items()}
    for name, hint in typing.get_type_hints(Saved).items():
        if name in values and not _is_a(hint, values[name]):
            raise ValueError(f"{name} is of type {type(values[name]).__name__}")
    for name, series in values["history"].items():
        if not _is_series(series):
            raise ValueError(f"the history of {name!r:.40} is no series")
    return Saved(**values)


def _is_series(value: Any) -> bool:
    """Says whether a value has the steps and values of one name in a history."""
    if not isinstance(value, dict):
        return False
    steps, values = value.get("steps"), value.get("values")
    if not (isinstance(steps, np.ndarray) and isinstance(values, np.ndarray)):
        return False
    return steps.ndim == 1 and steps.shape == values.shape and steps.dtype.kind == "i"


def _is_a(hint: Any, value: Any) -> bool:
    """Says whether a value is of the kind that a field of `Saved` has."""
    if isinstance(value, bool):
        return hint is bool
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return isinstance(value, tuple(typing.get_origin(option) or option for option in options))
