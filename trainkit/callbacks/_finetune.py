"""`Finetune`: groups of parameters that are frozen until they are due. The optimizer and the step carry it out."""

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

from trainkit._core.cadence import NEVER, At, Cadence, Never, as_cadence
from trainkit._core.patterns import Patterns
from trainkit.callbacks._callback import Action, Callback, Phase
from trainkit.callbacks._info import Info
from trainkit.optim._stages import Stages

_LOG = logging.getLogger("trainkit")


class Finetune(Callback):
    """Freezes parameters by their paths until they are due, then trains them.

    A group is trained from the first time on at which its cadence is due: `tk.At(steps=(10,))` has update 11 move it
    first. Until then it is not differentiated, moved by nothing, weight decay included, and its part of the optimizer
    state stays as it was made, so that counts and schedules begin at the release. Clipping by a global norm sees the
    gradients of the groups that are trained. Batch statistics of frozen layers move. Each release compiles the step
    anew, once.

    Works with any optimizer that treats each parameter by itself, `tk.optim.by_path` included. Its state is kept by
    groups: by pattern, and "rest" for the parameters without one, which are trained from the start.

    Args:
        groups: cadences by pattern: a regular expression, searched (`re.search`) in the path of a parameter, e.g.
            `encoder/Dense_0/kernel`; the first that is found counts. `tk.Never()` freezes for good; of `tk.At` and
            `tk.Every` the first step or pass counts. Passes are of the run.

    Raises:
        TypeError: `groups` is no mapping of strings to cadences.
        ValueError: it is empty, a pattern is no regular expression, or a cadence is in seconds, which would be another
            step in every run; at the first batch, when a pattern is found in no path, and when the optimizer has a
            state that can't be parted.

    Example:
        >>> from trainkit import At, Never
        >>> thawing = Finetune({"embedding": Never(), "encoder": At(steps=(1000,))})
    """

    phase: ClassVar[Phase] = Phase.MONITOR
    reads_epoch = False

    def __init__(self, groups: Mapping[str, Cadence]) -> None:
        if not isinstance(groups, Mapping):
            raise TypeError(
                f"Finetune takes a mapping of patterns to cadences, got {type(groups).__name__}; e.g. "
                "Finetune({'encoder': tk.At(steps=(1000,))})."
            )
        if not groups:
            raise ValueError("Finetune({}) freezes nothing; give a pattern, or leave it out.")
        cadences = {
            pattern: as_cadence(cadence, f"Finetune({pattern!r})") for pattern, cadence in groups.items()
        }
        for pattern, cadence in cadences.items():
            if cadence.seconds is not None:
                raise ValueError(
                    f"Finetune: {pattern!r} is released after seconds, at another step in every run. Give steps or "
                    "epochs, e.g. tk.At(steps=(1000,)) or tk.Every(epochs=1)."
                )
        self._groups = Stages(Patterns("Finetune", cadences), cadences)
        steps = {cadence.next_step(0) for cadence in cadences.values()} - {NEVER}
        # The loop stops at each release, after which another program runs.
        self.every = At(steps=tuple(map(int, steps))) if steps else Never()

    def _stages(self) -> Stages:
        return self._groups

    def on_epoch_start(self, info: Info) -> Action:
        self._groups.end_pass(info.epoch - 1, info.step)

    def on_step(self, info: Info) -> Action:
        held_back = sorted(self._groups.held_back(info.step))
        _LOG.info("from update %d on all is trained but for %s", info.step + 1, held_back or "nothing")

    def state_dict(self) -> dict[str, Any]:
        return {"released": dict(self._groups.released)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._groups.released = {pattern: int(step) for pattern, step in state["released"].items()}
