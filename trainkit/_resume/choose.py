"""Which checkpoint is meant: the newest that is whole, the best, or one by its step. Loads nothing."""

import contextlib
import logging
import os
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from trainkit._resume.saved import problems
from trainkit.checkpoint._reading import FOLDER, META
from trainkit.checkpoint._retention import Best
from trainkit.checkpoint._store import Store

_LOG = logging.getLogger("trainkit")
_NONE = -1


def choose(path: str | os.PathLike[str], step: int | str) -> tuple[Store, int]:
    """Returns a store and which of its checkpoints is meant.

    Args:
        path: a `logdir`, its folder of checkpoints, or one checkpoint.
        step: a step, "latest" or "best".

    Raises:
        FileNotFoundError: there is none.
        ValueError: `step` is something else, the checkpoint is damaged, or none was ranked.
    """
    folder = pathlib.Path(path)
    if (folder / META).is_file() and folder.name.isdecimal():
        folder, step = folder.parent, int(folder.name)
    elif (folder / FOLDER).is_dir():
        folder = folder / FOLDER
    store = Store(folder)
    steps = store.steps()
    if not steps:
        raise FileNotFoundError(f"there is no checkpoint in {os.fspath(path)!r}; give the logdir of a run.")
    if step == "latest":
        found = newest_whole(store, rename=False)
        assert found is not None
        return store, found
    if step == "best":
        step = _best(store, steps)
    if not isinstance(step, int) or isinstance(step, bool):
        raise ValueError(f"step={step!r}: expected an int, 'latest' or 'best'.")
    if step not in steps:
        raise FileNotFoundError(
            f"{folder} has no checkpoint of step {step}; it has those of {', '.join(map(str, steps))}."
        )
    damaged = problems(store, step)
    if damaged:
        raise ValueError(f"the checkpoint of step {step} in {folder} is damaged: {'; '.join(damaged)}.")
    return store, step


def _best(store: Store, steps: list[int]) -> int:
    best = None
    for step in steps:
        with contextlib.suppress(OSError, ValueError):  # a damaged one, which nobody asked for
            best = store.meta(step)["best"]
    if best is None:
        raise ValueError(
            f"the checkpoints in {store.folder} were saved without a ranking: there is no best. Write "
            "Checkpoint(best=('eval/loss', 'min')), or name a step."
        )
    found = store.best(Best(*best))
    if found is None:
        raise ValueError(
            f"no checkpoint has a value of {best[0]} that is a number: those in {store.folder} are of the steps "
            f"{', '.join(map(str, steps))}. Name one of them."
        )
    return found


def newest_of(stores: Sequence[Store]) -> tuple[Store, int] | None:
    """Returns the newest whole checkpoint of several folders and its store, None where there is none at all.

    Raises:
        ValueError: in one of them are checkpoints, and all are damaged.
    """
    found = [(store, step) for store in stores if (step := newest_whole(store)) is not None]
    return max(found, key=lambda one: one[1], default=None)


def newest_whole(store: Store, *, rename: bool = True) -> int | None:
    """Returns the newest checkpoint whose files are as they were written, None where there is none at all.

    Damaged ones newer than it are told, and renamed if asked for. Of several processes the first looks; all
    must call.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    if jax.process_count() == 1:
        return _newest_whole(store, rename)
    step, error = _NONE, None
    if jax.process_index() == 0:
        try:
            found = _newest_whole(store, rename)
            step = _NONE if found is None else found
        except ValueError as damaged:
            error = damaged
    told = np.asarray(multihost_utils.broadcast_one_to_all(np.array([step, error is not None], np.int32)))
    if told[1]:
        raise error or ValueError("every checkpoint is damaged; the first process names them.")
    return None if told[0] == _NONE else int(told[0])


def _newest_whole(store: Store, rename: bool) -> int | None:
    steps = store.steps()
    damaged = {}
    for step in reversed(steps):
        found = problems(store, step)
        if not found:
            for bad, why in damaged.items():
                _LOG.warning("the checkpoint of step %d is damaged: %s.", bad, "; ".join(why))
                if rename:
                    store.set_aside(bad)
            if damaged:
                _LOG.warning("the newest whole checkpoint is that of step %d.", step)
            return step
        damaged[step] = found
    if damaged:
        lines = "; ".join(f"step {step}: {', '.join(why)}" for step, why in damaged.items())
        raise ValueError(
            f"every checkpoint in {store.folder} is damaged ({lines}). Put whole copies in their place, or move "
            "the folder away to start afresh."
        )
    return None
