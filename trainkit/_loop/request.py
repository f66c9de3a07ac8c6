"""What a fit was asked to do, and how far that makes it run. Runs nothing."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from trainkit._core.cadence import Cadence
from trainkit._core.position import Position
from trainkit.callbacks._callback import Callback
from trainkit.callbacks._info import Plan
from trainkit.checkpoint._store import Store
from trainkit.data._source import Source
from trainkit.data._take import take
from trainkit.writers._writer import MetricWriter

LAST_STEP = 2**31 - 1
"""The largest number that `state.step`, an int32, holds."""


def refuse_overflow() -> None:
    """Refuses the step after the last one that can be counted."""
    raise OverflowError(
        f"state.step is {LAST_STEP}, the largest int32: the next update would make it negative, and with it every key, "
        "schedule and log. Start a run of its own from the weights: trainer.state = state.replace(step=0)."
    )


@dataclasses.dataclass(frozen=True)
class Request:
    """What one fit was asked to do; exactly one of `epochs` and `steps` is given.

    Attributes:
        fit: its number in the run.
        seed: of the trainer.
        writers: those of the user.
        stores: the checkpoints that it goes on from; none where it is not to be resumed.
        keep_compiled: whether compiled programs are kept in the user's cache.
        overwrite: whether a run that `logdir` holds is removed.
        dry: whether everything is only tried out.
        hparams: those of the trainer.
        card: returns what is noted of the run at its start, None where nothing is.
    """

    fit: int
    source: Source
    epochs: int | None
    steps: int | None
    evaluations: Mapping[str, Source]
    eval_every: Cadence | None
    accumulate: int
    callbacks: tuple[Callback, ...]
    logdir: pathlib.Path | None
    seed: int = 0
    writers: tuple[MetricWriter, ...] = ()
    stores: tuple[Store, ...] = ()
    keep_compiled: bool = True
    overwrite: bool = False
    dry: bool = False
    hparams: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    card: Callable[[], str] | None = None

    def as_dry_run(self, steps: int, logdir: pathlib.Path) -> "Request":
        """Returns the same request for a fit of a few steps, evaluations of as many batches, in a folder."""
        return dataclasses.replace(
            self,
            source=take(self.source, steps * self.accumulate),
            epochs=None if self.epochs is None else 1,
            steps=None if self.steps is None else min(self.steps, steps),
            evaluations={name: take(source, steps) for name, source in self.evaluations.items()},
            logdir=logdir,
            writers=(),
            stores=(),
            keep_compiled=False,
            dry=True,
            card=None,
        )

    def __post_init__(self) -> None:
        if self.epochs is not None and self.source.endless:
            raise ValueError(
                f"epochs={self.epochs} with data that have no end: no pass over them is ever done. Give steps=, or cut "
                "them, tk.data.take(data, batches)."
            )


def plan_of(request: Request, step: int, position: Position, first_step: int, first_epoch: int) -> Plan:
    """Returns how far a fit is going to run.

    Args:
        request: what it was asked.
        step: updates completed.
        position: where it stands in its data.
        first_step: updates completed when it began, before it was resumed.
        first_epoch: passes completed then.
    """
    if step >= LAST_STEP:
        refuse_overflow()
    per_epoch = request.source.steps_per_epoch
    last_epoch = None if request.epochs is None else first_epoch + request.epochs
    steps = None if request.steps is None else first_step + request.steps
    if per_epoch is not None:
        # The pass begun first, then whole ones; a tail shorter than `accumulate` is one update.
        left = -(-(per_epoch - position.batch) // request.accumulate)
        per_epoch = -(-per_epoch // request.accumulate)
        if last_epoch is not None:
            to_go = last_epoch - position.epoch + (1 if position.batch else 0)
            steps = step + (left + (to_go - 1) * per_epoch if to_go > 0 else 0)
    return Plan(
        first_step,
        steps,
        last_epoch,
        per_epoch,
        tuple(request.evaluations),
        request.dry,
        seed=request.seed,
        batch_size=position.rows or None,
        hparams=request.hparams,
    )
