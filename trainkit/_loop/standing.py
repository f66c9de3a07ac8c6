"""Where one fit stands between two steps. Owns the numbers and the state; what moves them is the loop."""

import dataclasses
from collections.abc import Sequence

from trainkit._core.position import Position
from trainkit._core.state import TrainState, key_impl, with_raw_key, with_typed_key
from trainkit._feed.feed import Fed
from trainkit._loop.request import Request, plan_of
from trainkit._resume.saved import Saved
from trainkit.callbacks._callback import Callback
from trainkit.callbacks._info import Plan


@dataclasses.dataclass
class Standing:
    """Where one fit stands.

    Attributes:
        raw: the train state after the last step, its key raw.
        impl: of that key.
        step: updates completed.
        position: in the data.
        first_step: updates completed when the fit began, before it was resumed.
        first_epoch: passes completed then.
        plan: how far it is going to run.
        stopped_by: why it is over before that, None where it is not.
        evaluation_owed: whether an evaluation is due at this step.
        epoch_end_owed: whether the pass is done and its end was not told.
        came_to: the step at which the fit was over, where it went back to an earlier one at its end.
        rollback: who asked to go back to a checkpoint, and why.
        wanted: ids of the checkpoints that were asked to save after this step.
        ran: steps that this fit ran, those that it went back on included.
        examples: real rows that these took.
    """

    raw: TrainState
    impl: str
    step: int
    position: Position
    first_step: int
    first_epoch: int
    plan: Plan
    stopped_by: str | None = None
    evaluation_owed: bool = False
    epoch_end_owed: bool = False
    came_to: int | None = None
    rollback: tuple[Callback, str] | None = None
    wanted: set[int] = dataclasses.field(default_factory=set)
    ran: int = 0
    examples: int = 0

    @property
    def state(self) -> TrainState:
        """The train state after the last step."""
        return with_typed_key(self.raw, self.impl)

    @state.setter
    def state(self, state: TrainState) -> None:
        self.raw = with_raw_key(state)

    def count(self, feds: Sequence[Fed]) -> None:
        """Counts the steps of a call."""
        batches = examples = 0
        for fed in feds:
            batches += fed.batches
            examples += fed.real
        self.step += len(feds)
        self.ran += len(feds)
        self.examples += examples
        self.position.batch += batches

    def plan_anew(self, request: Request) -> None:
        """Works out how far the fit is going to run from here."""
        self.plan = plan_of(request, self.step, self.position, self.first_step, self.first_epoch)


def standing_of(request: Request, state: TrainState, position: Position, resumed: Saved | None) -> Standing:
    """Returns where a fit begins.

    Args:
        request: what the fit was asked.
        state: to train.
        position: in the data.
        resumed: where an earlier process left it, None for a fit of its own.
    """
    step = int(state.step) if resumed is None else resumed.step
    begun = position.epoch - (1 if position.batch else 0)
    first = (step, begun) if resumed is None else (resumed.first_step, resumed.first_epoch)
    plan = plan_of(request, step, position, *first)
    standing = Standing(with_raw_key(state), key_impl(state), step, position, *first, plan)
    if resumed is not None:
        standing.stopped_by = resumed.stopped_by
        standing.came_to = None if goes_beyond(request, resumed) else resumed.came_to
        standing.evaluation_owed = resumed.evaluation_owed
        standing.epoch_end_owed = resumed.epoch_end_owed
    return standing


def goes_beyond(request: Request, saved: Saved) -> bool:
    """Says whether a fit that went back to an earlier step at its end is now asked for more than it had come to."""
    if saved.came_to is None or saved.stopped_by is not None:
        return False
    if request.steps is not None:
        return saved.first_step + request.steps > saved.came_to
    assert request.epochs is not None
    return saved.first_epoch + request.epochs > saved.epoch - (1 if saved.batch else 0)
