"""What a subclass of `Trainer` may define: the loss, the metrics, and for full control the steps. Runs none of it."""

import functools
from typing import Any, ClassVar

import clu.metrics
import jax

from trainkit._core.context import StepContext
from trainkit._core.state import TrainState
from trainkit._core.typing import Batch, Outputs, PyTree
from trainkit._core.weighted import Weighted
from trainkit._engine.engine import Engine
from trainkit.data._source import Source, as_source
from trainkit.metrics._accumulator import LossMetrics

OVERRIDABLE = ("loss", "metrics", "batch_axis", "train_step", "eval_step", "predict_step", "init_variables")


class Overridable:
    """The methods of a trainer that are its user's, with what they do unless they are overridden.

    Attributes:
        metrics: the collection that is computed from the outputs of the steps.
        batch_axis: 0, or None where a batch is one unit without a common leading axis, such as a padded `GraphsTuple`
            or a mesh. A unit is never padded and whole on each device. Its loss is a scalar, or `tk.Weighted` of any
            shape; the metrics get both as they are, without a mask, so what pads within a unit needs weights. It
            counts as one example: an evaluation of scalar losses is their mean over units, `accumulate=k` makes one
            step of k units, and `predict` returns a list with one entry a unit.
    """

    metrics: ClassVar[type[clu.metrics.Collection]] = LossMetrics
    batch_axis: ClassVar[int | None] = 0

    @functools.cached_property
    def _engine(self) -> Engine:
        raise NotImplementedError

    def loss(self, model: Any, batch: Batch, ctx: StepContext) -> tuple[jax.Array | Weighted, Outputs]:
        """Returns the losses of a batch and what the metrics are computed from. The one method you must write.

        The call runs inside the scope of the bound module: `model(x)`, `model.encode(x)`,
        `model.make_rng("dropout")` and several calls in a row work, and changed collections are kept.

        Args:
            model: your module, bound.
            batch: leaves `[batch, ...]`.
            ctx: what is known of the step.

        Returns:
            `losses`, float `[batch]`, or `tk.Weighted(losses, weights)` of any shape `[batch, ...]` (or a scalar: then
            no batch is ever padded), and `outputs`, a mapping that the metrics get as keyword arguments with `loss`
            `[batch]` and `mask` `bool[batch]`, and `weight` `[batch]` where the losses are weighted.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no loss. Define loss(self, model, batch, ctx) and return (losses, outputs), "
            "e.g. return optax.l2_loss(model(batch['x'])[:, 0], batch['y']), {}."
        )

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Outputs]:
        """Returns the state after one update, and the outputs for the metrics. Traced; override for full control.

        One call is one step, however often `apply_gradients` is called in it; batches are never padded. The key
        of the step is `jax.random.fold_in(state.rng, state.step)`.

        Args:
            state: before the update; its `step` is counted up by trainkit.
            batch: leaves `[batch, ...]`.

        Returns:
            The state, of the same structure, shapes and dtypes, and a mapping of what the metrics ask for.
        """
        return self._engine.steps.default_update(state, batch)

    def eval_step(self, state: TrainState, batch: Batch) -> Outputs:
        """Returns one batch's outputs for the metrics. Traced; by default those of `loss`, not training.

        The last rows of `batch` may be padding, which is masked afterwards; every output has one row per example.
        """
        return self._engine.steps.default_eval(state, batch)

    def predict_step(self, model: Any, batch: Batch, ctx: StepContext) -> PyTree:
        """Returns predictions, leaves `[batch, ...]`; runs in the scope of the bound module as `loss` does.

        By default the outputs of `loss`; override it to predict without labels.

        Raises:
            KeyError: `loss` needs what the batch has not, such as labels.
        """
        try:
            return self.loss(model, batch, ctx)[1]
        except KeyError as error:
            raise KeyError(
                f"{error.args[0]} is not in the batch. By default predict runs loss; to predict without it define "
                "predict_step(self, model, batch, ctx), e.g. return model(batch['image'], train=False)."
            ) from error

    def init_variables(self, rng: jax.Array, batch: Batch) -> dict[str, Any]:
        """Returns the variables to start from, `{"params": ..., ...}`. Traced; by default those `loss` creates."""
        return self._engine.steps.init_variables(rng, batch)

    def _source_of(self, data: Any) -> Source:
        return as_source(data, units=self.batch_axis is None)

    def _overridden(self, name: str) -> Any:
        return None if getattr(type(self), name) is getattr(Overridable, name) else getattr(self, name)
