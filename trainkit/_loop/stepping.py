"""What dispatches a step and what asks for its data: named in a trace where one runs. Owns no order of these."""

from collections.abc import Callable
from typing import Any

from trainkit._core.phases import phase, phases_are_named
from trainkit._feed.intake import Intake, RowIntake
from trainkit._loop.standing import Standing

Call = Callable[..., Any]


def stepping(
    calls: Call, intake: Intake | RowIntake, standing: Standing
) -> tuple[Call, Call, Callable[[], bool]]:
    """Returns what runs a call of steps, takes its batches, and says whether there are more.

    Args:
        calls: as dispatched.
        intake: of the pass.
        standing: where the fit stands.
    """
    if not phases_are_named():
        return calls, intake.take, intake.more

    def run(*args: Any) -> Any:
        with phase("step", standing.step):
            return calls(*args)

    def take(*args: Any) -> Any:
        with phase("data"):
            return intake.take(*args)

    def more() -> bool:
        with phase("data"):
            return intake.more()

    return run, take, more
