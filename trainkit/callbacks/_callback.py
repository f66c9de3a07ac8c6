"""The base class of callbacks, and what a hook may return. Owns no order of calls: the loop does."""

import copy
import dataclasses
import enum
from collections.abc import Callable
from typing import Any, ClassVar

from trainkit._core.cadence import Cadence, Every
from trainkit._core.state import TrainState
from trainkit._core.typing import Batch
from trainkit.callbacks._info import Info
from trainkit.hooks._hook import StepHook
from trainkit.hooks._probe import StepProbe
from trainkit.hooks._view import View
from trainkit.optim._stages import Stages


@dataclasses.dataclass(frozen=True)
class Stop:
    """Returned by a hook to end the fit after this step.

    Attributes:
        reason: what `result.stopped_by` will say.
    """

    reason: str


@dataclasses.dataclass(frozen=True)
class Update:
    """Returned by a hook to replace the train state between two steps.

    Attributes:
        fn: `fn(state) -> state` with the same structure, shapes and dtypes, so that nothing compiles again, and the
            same `step`. From `on_fit_end` it may return the whole state of an earlier step: the run then stands there,
            its newest checkpoint too, and a further fit takes back the logs after it.
    """

    fn: Callable[[TrainState], TrainState]


@dataclasses.dataclass(frozen=True)
class Save:
    """Returned by a hook to have every `Checkpoint` of the fit save after this step, whatever its cadence."""


@dataclasses.dataclass(frozen=True)
class Rollback:
    """Returned by a hook to go back to the newest checkpoint and pass over the batches since.

    Attributes:
        reason: why, for the log.
    """

    reason: str


Action = Stop | Update | Save | Rollback | None
"""What a hook may return."""


class Phase(enum.IntEnum):
    """Order of the callbacks at one step; within a phase they run in the order given."""

    GUARD = 0
    WRITE = 1
    MONITOR = 2
    CHECKPOINT = 3


AFRESH = "_state_before_its_first_fit"
"""Under which name the loop keeps what a callback remembered before its first fit."""


class Callback:
    """Host code that runs at fixed moments of a fit.

    Override the hooks you need; a hook that is not overridden is never called. Hooks see read-only
    information and hold on to no state. One fit, in order: `on_fit_start`; per epoch `on_epoch_start`, then
    `on_step` at the cadence `every`, `on_eval_start` and `on_eval_end` around each evaluation,
    `on_epoch_end`; `on_fit_end` on success; `on_exception` on any exception; then `close`, always, once.

    Attributes:
        every: cadence of `on_step`, each step by default.
        phase: place in the order at one step.
        reads_epoch: whether `on_epoch_end` looks at `info.metrics`. Where no callback does, the metrics are not parted
            at the end of a pass, which costs time where passes are short.

    Example:
        >>> class StopAt(Callback):
        ...     def on_step(self, info):
        ...         return Stop("far enough") if info.step >= 10 else None
    """

    every: Cadence = Every(steps=1)
    phase: ClassVar[Phase] = Phase.WRITE
    reads_epoch: bool = True

    def on_fit_start(self, info: Info) -> Action:
        """Called once when a fit begins, with the state it begins from."""

    def on_epoch_start(self, info: Info) -> Action:
        """Called before the first step of each pass over the training source."""

    def on_step(self, info: Info) -> Action:
        """Called after a step at which `every` is due."""

    def on_eval_start(self, info: Info) -> Action:
        """Called before each evaluation."""

    def on_eval_end(self, info: Info) -> Action:
        """Called after each evaluation, with the metrics of all its sources."""

    def on_epoch_end(self, info: Info) -> Action:
        """Called after the last step of each pass, and its evaluation; also of a pass broken off by `steps=`."""

    def on_save(self, info: Info) -> Action:
        """Called before a checkpoint of this step is saved, after all else at the step."""

    def on_fit_end(self, info: Info) -> Action:
        """Called once when a fit ends without an exception, stopped early or not."""

    def on_exception(self, info: Info, exc: BaseException) -> None:
        """Called when anything raised, a second Ctrl-C included; the exception is raised again afterwards.

        Args:
            info: as for the other hooks.
            exc: what was raised; an exception from here is attached to it as a note.
        """

    def close(self) -> None:
        """Called last, once, for every callback whose `on_fit_start` was begun, however the fit ended."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what this callback must remember across a resume: JSON values and arrays."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned."""

    def reset(self) -> None:
        """Begins afresh: called before a run that is not the one this object served last.

        A callback belongs to one run at a time. In a further fit of the same run it goes on; given to another
        trainer, or to one whose state was set, restored or reset, it is reset first. By default it loads what
        `state_dict` returned before its first fit; override it where more is remembered than that holds.
        """
        afresh = vars(self).get(AFRESH)
        if afresh is not None:
            self.load_state_dict(copy.deepcopy(afresh))

    def step_hook(self) -> StepHook | None:
        """Returns the pure pair to trace into the compiled training step, None for none."""
        return None

    def step_probe(self) -> StepProbe | None:
        """Returns what is to be computed in the steps at which `every` is due; `info.probed` then has the values.

        A cadence in seconds can't be known beforehand, nor the end of a pass of unknown length: `on_step` is then
        called after the step that follows, and the values are of that.
        """
        return None

    def eval_view(self) -> View | None:
        """Returns how the state is evaluated, predicted, exported and applied with; None for no view.

        With several, `weights="averaged"` is that of the callback given first.
        """

    def _stages(self) -> Stages | None:
        """Returns from which step on groups of parameters are trained, None to have no say; of one trainer one has."""
        return None

    def implements(self, hook: str) -> bool:
        """Says whether the method named `hook` does anything; others are never called."""
        return getattr(type(self), hook) is not getattr(Callback, hook)

    # Hooks of trainkit's own callbacks, called as the others are.

    def _see_batch(self, batch: Batch) -> None:
        """Called with each training batch that was handed to a step, as the source gave it: to count what is in it.

        It costs a call for each batch, where batches lie on the device their reading on the host too; a class that does
        not override it costs nothing. Several processes all see the whole batch.

        Args:
            batch: leaves `[rows, ...]` on the host, without padding; neither to be kept nor changed.
        """

    def _on_result(self, info: Info) -> None:
        """Called after every `close`, where nothing raised: for what is known when all is done, as `info.timing`."""
