"""`FitResult`, what a fit returns. Owns no logic."""

import dataclasses

from trainkit._core.history import History
from trainkit._core.state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a fit returns.

    Attributes:
        state: the train state at the end.
        step: updates completed, over all fits of the trainer.
        epoch: passes over the training source begun, over all fits of the trainer.
        seconds: wall-clock time of this fit, the compilation of its steps included.
        stopped_by: why the fit ended before its `epochs=` or `steps=`, None when it did not.
        history: every scalar logged, over all fits of the trainer; `history["eval/loss"]` is a list of
            `(step, value)` pairs.
    """

    state: TrainState = dataclasses.field(repr=False)
    step: int
    epoch: int
    seconds: float
    stopped_by: str | None
    history: History = dataclasses.field(repr=False)
