"""`NanGuard`: what follows from a step that is not finite. The step itself refuses it; see the step hook."""

import logging
from typing import Any, ClassVar, Literal

import jax
import numpy as np

from trainkit._core.cadence import Cadence, Every, as_cadence
from trainkit._core.errors import NonFiniteError
from trainkit._core.state import TrainState
from trainkit._core.tree import begin_fetch, copy_array
from trainkit.callbacks._callback import Action, Callback, Phase, Rollback, Update
from trainkit.callbacks._info import Info
from trainkit.hooks._hook import StepHook
from trainkit.hooks._nan_guard import forget, leaf_names, nan_guard_hook
from trainkit.writers._writer import MetricWriter

_LOGGER = logging.getLogger("trainkit")
_EVERY = Every(steps=50)
_ACTIONS = ("raise", "skip", "rollback")


class NanGuard(Callback):
    """Keeps steps that are not finite out of the state, in the compiled step, and says so.

    A step is not finite when its loss is not, a gradient, or a leaf of the model state (`batch_stats` and
    other collections) that was finite before; where `train_step` is overridden, its output `loss`, a
    parameter or the model state. Such a step leaves the state and the metrics as they were; only `step` counts
    on, so that the next one has a key of its own.

    - "raise": every later update is refused too, so the state stays the one before the bad step until the host
      looks; then `tk.NonFiniteError` names the step and its first leaf that is not finite.
    - "skip": training goes on. The count of refused updates is written as `skipped_steps` where it has changed,
      and the last of them named in the log.
    - "rollback": as "raise", but the fit returns to its newest checkpoint and passes over the batches since.

    The host looks at the cadence, one interval late so that the devices run on, and at once before an
    evaluation and at the end. With `precision="float16"` gradients that overflow are the loss scale's affair,
    until it can't be lowered.

    Args:
        action: "raise", "skip" or "rollback".
        every: cadence at which the host looks.
        name: key in `state.hooks`.

    Raises:
        ValueError: `action` is none of the three.
        TypeError: `every` is not a cadence.

    Example:
        >>> callbacks = [NanGuard("skip")]
    """

    phase: ClassVar[Phase] = Phase.GUARD

    def __init__(
        self,
        action: Literal["raise", "skip", "rollback"] = "raise",
        every: Cadence = _EVERY,
        *,
        name: str = "nan_guard",
    ) -> None:
        if action not in _ACTIONS:
            raise ValueError(
                f"NanGuard(action={action!r}): the choices are {', '.join(map(repr, _ACTIONS))}."
            )
        self.every = as_cadence(every, "every")
        self._action, self._name = action, name
        self._writer: MetricWriter | None = None
        self._leaves: list[str] = []
        self._written = 0
        self._pending: tuple[int, jax.Array] | None = None

    def step_hook(self) -> StepHook:
        return nan_guard_hook(self._name, hold=self._action != "skip")

    def on_fit_start(self, info: Info) -> Action:
        self._writer, self._leaves, self._pending = info.writer, leaf_names(info.state), None
        if info.step == 0:
            self._written = 0
        step, leaf, _ = np.asarray(self._record(info.state)).tolist()
        if self._action == "skip" or not step:
            return None
        _LOGGER.warning(
            "updates were refused from step %d on, whose %s was not finite; training goes on from the state before it.",
            step,
            self._leaves[leaf],
        )
        return Update(lambda state: forget(state, self._name))

    def on_step(self, info: Info) -> Action:
        action = self._settle()
        if action is not None:
            return action  # this step is undone as well
        # Copied, because the next step takes the buffers of the state.
        record = copy_array(self._record(info.state))
        begin_fetch(record)
        self._pending = info.step, record
        return None

    def on_eval_start(self, info: Info) -> Action:
        return self._settle() if self._action == "skip" else self.look(info)

    def on_save(self, info: Info) -> Action:
        # A save must not change the log, so what is skipped is told at its cadence only.
        return self._settle() if self._action == "skip" else self.look(info)

    def on_fit_end(self, info: Info) -> Action:
        return self.look(info)

    def on_exception(self, info: Info, exc: BaseException) -> None:
        action = None if isinstance(exc, NonFiniteError) else self.look(info)
        if isinstance(action, Rollback):
            exc.add_note(action.reason)

    def close(self) -> None:
        self._writer = self._pending = None

    def state_dict(self) -> dict[str, Any]:
        """Writes what is pending, so that a run resumed from here leaves no gap in the log."""
        if self._action == "skip":
            self._settle()
        return {"written": self._written}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._written, self._pending = state["written"], None

    def look(self, info: Info) -> Action:
        """Looks at the steps up to this one at once, which waits for the devices.

        Args:
            info: valid during the call.

        Returns:
            `Rollback` where one is due, else None.

        Raises:
            NonFiniteError: a step was not finite, and the action is "raise".
        """
        action = self._settle()
        return action or self._act(info.step, np.asarray(self._record(info.state)))

    def _record(self, state: TrainState) -> jax.Array:
        return state.hooks[self._name].record

    def _settle(self) -> Action:
        if self._pending is None:
            return None
        # Forgotten first: where reading raises, `on_exception` must not run into the same again.
        (step, record), self._pending = self._pending, None
        return self._act(step, np.asarray(record))

    def _act(self, step: int, record: np.ndarray) -> Action:
        bad_step, leaf, skipped = record.tolist()
        if self._action == "skip":
            self._write(step, skipped, bad_step, leaf)
        elif bad_step and self._action == "raise":
            raise NonFiniteError(bad_step, self._leaves[leaf])
        elif bad_step:
            return Rollback(
                f"step {bad_step} is not finite, and {self._leaves[leaf]} is the first leaf that is not"
            )
        return None

    def _write(self, step: int, skipped: int, bad_step: int, leaf: int) -> None:
        if skipped == self._written:
            return
        assert self._writer is not None
        self._written = skipped
        self._writer.write_scalars(step, {"skipped_steps": float(skipped)})
        _LOGGER.warning(
            "%d updates were skipped so far because they were not finite, the last at step %d (%s).",
            skipped,
            bad_step,
            self._leaves[leaf],
        )
