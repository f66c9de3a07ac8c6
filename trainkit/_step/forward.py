"""The user's loss and predictions as functions over the rows of one program: bound, mapped, checked.

Owns how they are called; no update, and no metrics.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from trainkit._core.context import StepContext
from trainkit._core.typing import Batch, PyTree, Variables
from trainkit._core.weighted import Weighted
from trainkit._models.model import Model
from trainkit._step.checks import check_loss_result, check_losses, explained_shapes
from trainkit._step.given import Constants
from trainkit.parallel._strategy import Strategy


@dataclasses.dataclass(frozen=True)
class UserFunctions:
    """The methods of a trainer that steps are made of; None where the user keeps the default.

    Attributes:
        units: whether a batch is one unit without rows.
    """

    loss: Callable[..., Any]
    predict_step: Callable[..., Any]
    init_variables: Callable[..., Any] | None = None
    train_step: Callable[..., Any] | None = None
    eval_step: Callable[..., Any] | None = None
    units: bool = False


class Forward:
    """Runs the user's functions in the scope of the model, over all rows of a batch.

    Attributes:
        weighted: whether the losses were `Weighted` where they were last traced.

    Args:
        model: binds the module.
        strategy: maps a function of one example, or of one replica's rows, over the batch.
        user: the functions.
        remat: recompute activations in the backward pass; True, or a policy of `jax.checkpoint_policies`.
        constants: what the trainer gives its steps beside state and batch.
    """

    def __init__(
        self,
        model: Model,
        strategy: Strategy,
        user: UserFunctions,
        remat: bool | Callable[..., bool],
        constants: Constants,
    ) -> None:
        self._model, self._strategy, self._user, self._remat = model, strategy, user, remat
        self._constants = constants
        self.weighted = False

    def variables(self, rng: jax.Array, batch: Batch) -> dict[str, Any]:
        """Returns the variables that one call of the loss creates."""
        mask = self._strategy.example(self.real(batch, None))
        ctx = self._context(train=True, step=jnp.zeros((), jnp.int32), rng=rng, mask=mask)
        return self._model.init(self._checked_loss, rng, self._strategy.example(batch), ctx)

    def losses(
        self,
        variables: Variables,
        batch: Batch,
        mask: jax.Array | None,
        step: jax.Array | int,
        rng: jax.Array,
        *,
        train: bool,
    ) -> tuple[jax.Array | Weighted, dict[str, Any], dict[str, Any]]:
        """Returns the losses of a batch, the outputs, and the collections that changed.

        The losses are `[batch]`, a scalar, or `Weighted` ones `[batch, ...]`.
        """
        forward = self._strategy.map_forward(functools.partial(self._loss, train))
        if train and self._remat:
            policy = self._remat if callable(self._remat) else None
            forward = jax.checkpoint(forward, policy=policy)
        losses, outputs, updated = forward(variables, batch, self.real(batch, mask), step, rng)
        check_losses(losses, self.rows(batch), one_example=self.sees_one_example)
        self.weighted = isinstance(losses, Weighted)
        return losses, outputs, updated

    def predictions(
        self,
        variables: Variables,
        batch: Batch,
        mask: jax.Array | None,
        step: jax.Array | int,
        rng: jax.Array,
    ) -> PyTree:
        """Returns what `predict_step` gives, leaves `[batch, ...]`."""

        def forward(variables: Any, batch: Batch, mask: jax.Array, step: jax.Array, rng: jax.Array) -> Any:
            ctx = self._context(train=False, step=step, rng=rng, mask=mask, params=variables["params"])
            result, _ = self._model.apply(self._user.predict_step, variables, rng, batch, ctx, train=False)
            return result, {}, {}

        mapped = self._strategy.map_forward(forward)
        return mapped(variables, batch, self.real(batch, mask), step, rng)[0]

    def captured(
        self,
        variables: Variables,
        batch: Batch,
        mask: jax.Array | None,
        step: jax.Array | int,
        rng: jax.Array,
    ) -> dict[str, Any]:
        """Returns what each module returned in a training pass, leaves `[rows, ...]`; see `Model.captured`."""

        def forward(variables: Any, batch: Batch, mask: jax.Array, step: jax.Array, rng: jax.Array) -> Any:
            ctx = self._context(train=True, step=step, rng=rng, mask=mask, params=variables["params"])
            return self._model.captured(self._checked_loss, variables, rng, batch, ctx), {}, {}

        return self._strategy.map_forward(forward)(variables, batch, self.real(batch, mask), step, rng)[0]

    def rows(self, batch: Batch) -> int | None:
        """Returns the leading dimension of `batch`; None where it is one unit."""
        if self._user.units:
            return None
        return next(leaf.shape[0] for leaf in jax.tree.leaves(batch) if leaf.ndim)

    def real(self, batch: Batch, mask: jax.Array | None) -> jax.Array:
        """Returns `mask`, where it is None that of a batch without padding; a unit is one example."""
        return jnp.ones((self.rows(batch) or 1,), bool) if mask is None else mask

    def mask_output(self, batch: Batch, mask: jax.Array | None) -> dict[str, jax.Array]:
        """Returns the mask as the metrics get it: none where a batch is one unit, whose outputs have any shape."""
        return {} if self._user.units else {"mask": self.real(batch, mask)}

    def applied(
        self,
        fn: Callable[..., Any],
        variables: Variables,
        args: tuple[Any, ...],
        step: jax.Array | int,
        rng: jax.Array,
    ) -> Any:
        """Returns `fn(bound module, *args)` with the batch axis bound, of size 1 where rows are mapped over it.

        A function with a parameter named `ctx` is given the context by that name.
        """
        asks = asks_for_context(fn)

        def forward(variables: Any, _: Any, mask: jax.Array, step: jax.Array, own: jax.Array) -> Any:
            ctx = self._context(train=False, step=step, rng=rng, mask=mask, params=variables["params"])
            called = functools.partial(fn, ctx=ctx) if asks else fn
            return self._model.apply(called, variables, rng, *args, train=False)[0], {}, {}

        one_row = jnp.zeros((1,))
        result = self._strategy.map_forward(forward)(variables, one_row, jnp.ones((1,), bool), step, rng)[0]
        return jax.tree.map(lambda leaf: leaf[0], result) if self.sees_one_example else result

    @functools.cached_property
    def sees_one_example(self) -> bool:
        """Whether the loss is called with one example at a time."""
        return jax.eval_shape(self._strategy.example, jax.ShapeDtypeStruct((1,), bool)).ndim == 0

    def _loss(
        self, train: bool, variables: Any, batch: Batch, mask: jax.Array, step: jax.Array, rng: jax.Array
    ) -> Any:
        ctx = self._context(train=train, step=step, rng=rng, mask=mask, params=variables["params"])
        (losses, outputs), updated = self._model.apply(
            self._checked_loss, variables, rng, batch, ctx, train=train
        )
        # What was sown was for the loss to read back; the state carries the collections it began with.
        carried = {name: updated[name] for name in variables if train and name in updated}
        return losses, outputs, carried

    def _context(self, **known: Any) -> StepContext:
        given = self._constants.now()
        return StepContext(frozen=given.frozen, hparams=given.hparams, **known)

    def _checked_loss(self, module: Any, batch: Batch, ctx: StepContext) -> tuple[jax.Array, dict[str, Any]]:
        with explained_shapes(batch, one_example=self.sees_one_example):
            result = self._user.loss(module, batch, ctx)
        return check_loss_result(result)


def asks_for_context(fn: Callable[..., Any]) -> bool:
    """Says whether a function has a parameter named `ctx`."""
    try:
        return "ctx" in inspect.signature(fn).parameters
    except (TypeError, ValueError):
        return False
