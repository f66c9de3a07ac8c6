"""The pure steps that leave a state as it is: evaluate, predict, apply. Owns no loop and no device layout."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from trainkit._core.state import TrainState, key_of, with_typed_key
from trainkit._core.typing import Batch, Outputs, PyTree
from trainkit._core.weighted import Weighted
from trainkit._models.model import Model
from trainkit._step.checks import check_outputs
from trainkit._step.forward import Forward, UserFunctions
from trainkit._step.given import Constants, Given
from trainkit._step.losses import for_metrics
from trainkit._step.statistics import MeasuringStep
from trainkit._step.trace import TraceLog
from trainkit.metrics._accumulator import Accumulator
from trainkit.parallel._strategy import Strategy


class EvalSteps:
    """The pure steps of one trainer that look at a state.

    Attributes:
        strategy: how steps run on the devices.
        forward: runs the user's functions.
        constants: what steps are given beside state and batch.
        traces: notes what was traced.
    """

    def __init__(
        self, model: Model, strategy: Strategy, user: UserFunctions, forward: Forward, constants: Constants
    ) -> None:
        self._model, self.strategy, self._user = model, strategy, user
        self.forward, self.constants, self.traces = forward, constants, TraceLog()

    def merge_metrics(self, accumulator: Accumulator, packed: Any, outputs: Outputs) -> Any:
        """Returns the carried metrics with the outputs of a step merged into them."""
        return accumulator.update(packed, axis_name=self.strategy.replica_axis, **outputs)

    def evaluate(
        self,
        accumulator: Accumulator,
        impl: str,
        given: Given | None,
        state: TrainState,
        carry: Any,
        batch: Batch,
        mask: jax.Array | None,
    ) -> tuple[Any, dict[str, Any]]:
        """Metrics of one batch merged into `carry`, a pair of `packed` and `int32[]` examples counted.

        Returns:
            The next `carry`, and the rows that metrics computed on the host ask for.
        """
        self.traces.record("evaluation", {"state": state, "batch": batch, "mask": mask})
        packed, counted = carry
        _, outputs = self.eval_outputs(given, with_typed_key(state, impl), batch, mask)
        packed = self.merge_metrics(accumulator, packed, outputs)
        counted = counted + self.strategy.sum(self.forward.real(batch, mask).sum(dtype=jnp.int32))
        return (packed, counted), accumulator.collect(**outputs)

    def default_eval(self, state: TrainState, batch: Batch, mask: jax.Array | None = None) -> dict[str, Any]:
        """What `Trainer.eval_step` does unless it is overridden: the loss with `ctx.train` False."""
        return self._eval_forward(state, batch, mask)[1]

    def _eval_forward(
        self, state: TrainState, batch: Batch, mask: jax.Array | None
    ) -> tuple[jax.Array | Weighted, dict[str, Any]]:
        losses, outputs, _ = self.forward.losses(
            state.variables, batch, mask, state.step, step_key(state), train=False
        )
        return losses, for_metrics(losses, outputs, mask, self.forward.rows(batch))

    def predict(
        self, impl: str, given: Given | None, state: TrainState, batch: Batch, mask: jax.Array | None
    ) -> PyTree:
        """Outputs of `predict_step` for one batch, leaves `[batch, ...]`."""
        self.traces.record("prediction", {"state": state, "batch": batch, "mask": mask})
        return self.prediction(impl, given, state, batch, mask)

    def prediction(
        self, impl: str, given: Given | None, state: TrainState, batch: Batch, mask: jax.Array | None
    ) -> PyTree:
        """As `predict`, for a program of its own: it takes no part in the report of what compiles again."""
        state = with_typed_key(state, impl)
        with self.constants.traced(given):
            return self.forward.predictions(state.variables, batch, mask, state.step, step_key(state))

    def applied(
        self,
        impl: str,
        fn: Callable[..., Any],
        given: Given | None,
        state: TrainState,
        args: tuple[Any, ...],
        rng: jax.Array | None,
    ) -> PyTree:
        """Returns `fn(bound module, *args)`, not training; what it changes is dropped. `rng` is the step's if None."""
        state = with_typed_key(state, impl)
        key = step_key(state) if rng is None else rng
        with self.constants.traced(given):
            return self.forward.applied(fn, state.variables, args, state.step, key)

    @functools.cached_property
    def statistics(self) -> MeasuringStep:
        """The step that measures the batch statistics of one batch."""
        return MeasuringStep(self._model, self.strategy, self._user, self.constants)

    def eval_outputs(
        self, given: Given | None, state: TrainState, batch: Batch, mask: jax.Array | None
    ) -> tuple[bool, dict[str, Any]]:
        """Returns whether the loss comes one per example, and one batch's outputs for the metrics."""
        with self.constants.traced(given):
            return self._eval_outputs(state, batch, mask)

    def _eval_outputs(
        self, state: TrainState, batch: Batch, mask: jax.Array | None
    ) -> tuple[bool, dict[str, Any]]:
        if self._user.eval_step is None:
            losses, outputs = self._eval_forward(state, batch, mask)
            return is_per_example(losses), outputs
        outputs = self._user.eval_step(state, batch)
        check_outputs("eval_step", outputs)
        return True, {**outputs, **self.forward.mask_output(batch, mask)}

    @property
    def units(self) -> bool:
        """Whether a batch is one unit without rows, which is never padded nor divided."""
        return self._user.units

    @property
    def has_own_eval(self) -> bool:
        """Whether the user wrote `eval_step`, which may look at all of the state."""
        return self._user.eval_step is not None


def step_key(state: TrainState) -> jax.Array:
    """Returns the key of the next step."""
    # Costs nothing where the loss draws no numbers: the compiler drops it.
    return jax.random.fold_in(key_of(state), state.step)


def is_per_example(losses: jax.Array | Weighted) -> bool:
    """Says whether a loss comes one per example."""
    return isinstance(losses, Weighted) or losses.ndim == 1
