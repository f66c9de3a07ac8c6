"""`Checkpoint`: says when a run is saved and what is kept. Writes no file; the store does."""

import json
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from trainkit._core.cadence import Cadence, Every, as_cadence
from trainkit.callbacks._callback import Action, Callback, Phase, Save
from trainkit.callbacks._info import Info
from trainkit.callbacks._monitor import check_count
from trainkit.checkpoint._reading import FOLDER
from trainkit.checkpoint._retention import Best, Retention, best_steps
from trainkit.checkpoint._store import Contents, Store

MakeContents = Callable[[Mapping[str, Any]], Contents]
"""`make(labels)` returns what is to be saved, with labels for lists; called only where something is."""

_EVERY = Every(epochs=1)


class Checkpoint(Callback):
    """Saves the whole run, so that `fit(..., resume=True)` goes on as if it had never ended.

    A checkpoint is saved at the cadence, after an evaluation that is the best so far, and when the fit ends,
    stopped or interrupted; once at most for a step. It is complete or absent: files are written in the background
    while training goes on, and the folder gets its name when all are there. Nothing outside the folder is removed.

    Args:
        every: cadence.
        keep: int >= 1, how many of the newest are kept; None keeps all.
        best: `(name, mode)`, e.g. `("eval/loss", "min")`: the checkpoint with the best value of this metric is kept
            as well. Of equal values the older is; NaN is never the best.
        top: int >= 1, how many of the best are kept; wants `best`. What is kept is the union: the newest, and the best.
        weights_only: save parameters, model state and the averages that evaluations read, and nothing else: for
            `trainer.restore`, then `evaluate` or a run from these weights. A run can't be resumed from it, nor rolled
            back to it: give a second `Checkpoint`, with a `folder` of its own, for that.
        folder: where to; None for `checkpoints` in the `logdir` of the trainer.
        metadata: JSON values to keep with each, e.g. the configuration of the run.

    Raises:
        TypeError: `every` is not a cadence, or `metadata` is not JSON.
        ValueError: `keep`, `best` or `top` can't be; at the start of a fit, when there is no folder, or when it has
            checkpoints of later steps than the fit begins from, which saving would mix with those of another run;
            at the first evaluation, when the metric of `best` is not in it.
        OSError: a checkpoint could not be written, those before it are whole; at the start of a fit, when the folder
            cannot be made or written to.

    Example:
        >>> checkpoint = Checkpoint(Every(steps=1000), keep=3, best=("eval/loss", "min"))
        >>> weights = Checkpoint(best=("eval/loss", "min"), top=5, keep=1, weights_only=True, folder="runs/best")
    """

    phase: ClassVar[Phase] = Phase.CHECKPOINT

    def __init__(
        self,
        every: Cadence = _EVERY,
        *,
        keep: int | None = 3,
        best: tuple[str, Literal["min", "max"]] | None = None,
        top: int | None = None,
        weights_only: bool = False,
        folder: str | os.PathLike[str] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.every = as_cadence(every, "every")
        if keep is not None:
            check_count("Checkpoint", "keep", keep, least=1, why="the newest one is what a resumed run needs")
        self._best = None if best is None else _as_best(best)
        self._top = 1
        if top is not None:
            check_count("Checkpoint", "top", top, least=1, why="it is how many of the best are kept")
            if best is None:
                raise ValueError(
                    f"Checkpoint(top={top}) keeps the best by a metric: say which, e.g. best=('eval/loss', 'min')."
                )
            self._top = top
        self.weights_only = weights_only
        self._retention = Retention(keep, self._best, self._top)
        self._folder = None if folder is None else pathlib.Path(folder)
        self._metadata = dict(metadata or {})
        _check_json(self._metadata)
        self._store: Store | None = None
        self._scores: tuple[int, dict[str, float]] = (-1, {})
        self._best_values: list[float] = []
        self._begun = False

    def folder(self, logdir: pathlib.Path | None) -> pathlib.Path:
        """Returns where the checkpoints of a trainer with this `logdir` are.

        Raises:
            ValueError: neither has a folder.
        """
        if self._folder is not None:
            return self._folder
        if logdir is None:
            raise ValueError(
                "Checkpoint has no folder: give the trainer a logdir, or write Checkpoint(folder=...)."
            )
        return logdir / FOLDER

    def on_fit_start(self, info: Info) -> None:
        folder = self.folder(info.logdir)
        if info.plan.dry_run:
            folder = pathlib.Path(tempfile.mkdtemp(prefix=f"{FOLDER}-", dir=info.logdir))
        self._store = Store(folder)
        self._store.prepare()
        self._store.clean()
        later = [step for step in self._store.steps() if step > info.step]
        begun, self._begun = self._begun, True
        if begun and self.weights_only:
            # Resumed from another folder, the run comes to these steps again, as its logs do.
            for step in later:
                self._store.remove(step)
        elif later:
            raise ValueError(
                f"{self._store.folder} has checkpoints of the steps {', '.join(map(str, later))}, and this fit begins "
                f"at step {info.step}. To go on with that run write fit(..., resume=True); for a new one give "
                "another logdir, or move the old checkpoints away."
            )

    def on_eval_end(self, info: Info) -> Action:
        if self._best is None:
            return None
        if self._best.name not in info.metrics:
            raise ValueError(
                f"Checkpoint(best=({self._best.name!r}, ...)): there is no such metric; this evaluation has "
                f"{', '.join(sorted(info.metrics))}."
            )
        value = float(info.metrics[self._best.name])
        self._scores = info.step, {self._best.name: value}
        sign = 1 if self._best.mode == "min" else -1
        if math.isnan(value):
            return None
        ranked = sorted(
            [*self._best_values, value], key=lambda one: sign * one
        )  # keeps the order of equal ones
        if len(ranked) > self._top and value == ranked[-1]:
            return None
        self._best_values = ranked[: self._top]
        return Save()

    def on_step(self, info: Info) -> Action:
        return Save()

    def state_dict(self) -> dict[str, Any]:
        return {"best_values": list(self._best_values), "begun": self._begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scores, self._begun = (-1, {}), bool(state["begun"])
        self._best_values = [float(value) for value in state["best_values"]]

    def close(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            try:
                store.wait()
                store.retain(self._retention)
            finally:
                store.close()

    def save(self, step: int, make: MakeContents) -> None:
        """Begins to save `step` unless it is saved; called by the loop, after all else at the step.

        Args:
            step: updates completed.
            make: returns what to save.
        """
        store = self.store
        scores = self._scores[1] if self._scores[0] == step else {}
        store.wait()
        if step not in store.steps():
            store.save(step, make(self._labels(scores)), self._retention)
        elif scores:
            store.add_scores(step, scores)

    def stand_at(self, step: int, make: MakeContents) -> None:
        """Makes `step`, to which the run went back at its end, the newest: later ones go once it is complete.

        Args:
            step: updates completed.
            make: returns what to save.
        """
        store = self.store
        store.wait()
        scores = {}
        if step in store.steps():
            # Broken off from here on, a resumed run finds the later ones, and goes back again.
            scores = store.meta(step)["scores"]
            store.remove(step)
        store.save(step, make(self._labels(scores)))
        store.wait()
        for later in store.steps():
            if later > step:
                store.remove(later)
        if self._best is not None:
            name, scores = self._best.name, store.scores()
            self._best_values = [scores[step][name] for step in best_steps(scores, self._best, self._top)]

    def _labels(self, scores: Mapping[str, float]) -> dict[str, Any]:
        best = None if self._best is None else (self._best.name, self._best.mode)
        return {"scores": dict(scores), "best": best, "metadata": self._metadata}

    @property
    def store(self) -> Store:
        """The checkpoints, during a fit."""
        if self._store is None:
            raise RuntimeError("Checkpoint saves during a fit only.")
        return self._store


def _as_best(best: Any) -> Best:
    if not (isinstance(best, tuple | list) and len(best) == 2 and isinstance(best[0], str)):
        raise ValueError(f"Checkpoint(best={best!r}): expected a name and a mode, e.g. ('eval/loss', 'min').")
    name, mode = best
    if mode not in ("min", "max"):
        raise ValueError(f"Checkpoint(best={best!r}): the mode is 'min' or 'max'.")
    return Best(name, mode)


def _check_json(metadata: dict[str, Any]) -> None:
    try:
        json.dumps(metadata)
    except (TypeError, ValueError) as error:
        raise TypeError(f"Checkpoint(metadata=...) must be JSON: {error}.") from error
