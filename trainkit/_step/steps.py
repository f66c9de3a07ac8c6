"""The pure steps that make and change a state: initialise, train. Runs the hooks; owns no loop and no device layout."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from trainkit._core.state import OVERWRITTEN, TrainState, with_raw_key, with_typed_key
from trainkit._core.tree import select
from trainkit._core.typing import Batch, Outputs, PyTree, Variables
from trainkit._core.weighted import Weighted
from trainkit._models.model import Model
from trainkit._models.precision import Precision
from trainkit._step.checks import (
    check_scales,
    check_step_result,
    check_trainable,
    check_unused,
)
from trainkit._step.evaluation import EvalSteps, is_per_example, step_key
from trainkit._step.forward import Forward, UserFunctions
from trainkit._step.given import Constants, Given
from trainkit._step.guard import settle, unless_weightless
from trainkit._step.losses import for_metrics, mean_share, of_all, quotient
from trainkit._step.parts import Apply, Parts, Pass, Share, Updated
from trainkit._step.trained import split, with_still, with_zeros
from trainkit.hooks._hook import StepHook, admitted, init_hooks, update_hooks
from trainkit.hooks._loss_scale import NAME as LOSS_SCALE
from trainkit.hooks._loss_scale import adjusted, all_finite, loss_scale_hook
from trainkit.metrics._accumulator import Accumulator
from trainkit.optim._staged import Staged
from trainkit.parallel._strategy import Strategy


class Steps(EvalSteps):
    """The pure steps of one trainer, for its model, optimizer, hooks and strategy.

    Attributes:
        accumulate: batches that make one step.
    """

    def __init__(
        self,
        *,
        model: Model,
        tx: optax.GradientTransformation,
        strategy: Strategy,
        hooks: tuple[StepHook, ...],
        user: UserFunctions,
        precision: Precision,
        accumulate: int,
        remat: bool | Callable[..., bool],
        constants: Constants,
    ) -> None:
        super().__init__(model, strategy, user, Forward(model, strategy, user, remat, constants), constants)
        self._tx = tx
        self._hooks = (loss_scale_hook(), *hooks) if precision.scaled else hooks
        self._precision, self.accumulate, self._remat = precision, accumulate, remat
        self._default_is_used = user.train_step is None

    # Initialisation -------------------------------------------------------------------------------------------

    def init(self, given: Given | None, rng: jax.Array, batch: Batch) -> TrainState:
        """Returns the state at step 0 from `rng` and the shapes of `batch`; to be compiled as one program."""
        return self._init(given, rng, batch)

    @functools.cached_property
    def _init(self) -> Any:
        def init(given: Given | None, rng: jax.Array, batch: Batch) -> TrainState:
            init_rng, step_rng = jax.random.split(rng)
            init_variables = self._user.init_variables or self.init_variables
            with self.constants.traced(given):
                variables = init_variables(init_rng, batch)
            return self.state_of(variables, step_rng)

        return _traced_once(init)

    def state_of(self, variables: Variables, rng: jax.Array) -> TrainState:
        """Returns the state at step 0 with these variables."""
        state = TrainState.from_variables(
            apply_fn=self._model.apply_fn, variables=variables, tx=self._tx, rng=rng
        )
        return init_hooks(self._hooks, state)

    def with_hooks(self, state: TrainState) -> TrainState:
        """Returns `state` with the memory of the hooks it lacks initialised, and of others left out."""
        fresh = init_hooks(tuple(hook for hook in self._hooks if hook.name not in state.hooks), state).hooks
        kept = {hook.name: state.hooks[hook.name] for hook in self._hooks if hook.name in state.hooks}
        return state.replace(hooks={**kept, **fresh})

    def init_variables(self, rng: jax.Array, batch: Batch) -> dict[str, Any]:
        """Returns the variables that one call of the loss creates."""
        return self.forward.variables(rng, batch)

    # Training -------------------------------------------------------------------------------------------------

    def train(
        self,
        accumulator: Accumulator,
        impl: str,
        given: Given | None,
        state: TrainState,
        packed: Any,
        batch: Batch,
        mask: jax.Array | None,
    ) -> tuple[TrainState, Any]:
        """One optimizer update, its hooks and its metrics.

        Args:
            accumulator: of the training metrics.
            impl: of the key in `state`.
            given: beside state and batch.
            state: donated; its key is raw, see `with_raw_key`.
            packed: what `accumulator` carries.
            batch: leaves `[batch, ...]`; a tuple of batches where gradients are accumulated.
            mask: `bool[batch]`, None when every row is real; as `batch` a tuple.

        Returns:
            The next state and the next `packed`.
        """
        self.traces.record("training", {"state": state, "batch": batch, "mask": mask})
        new_state, merged, _ = self.advance(
            accumulator, given, with_typed_key(state, impl), packed, batch, mask
        )
        return with_raw_key(new_state), merged

    def advance(
        self,
        accumulator: Accumulator,
        given: Given | None,
        state: TrainState,
        packed: Any,
        batch: Batch,
        mask: jax.Array | None,
    ) -> tuple[TrainState, Any, Updated]:
        """As `train`, with typed keys, and with the update before hooks looked at it."""
        with self.constants.traced(given):
            return self._advanced(accumulator, given, state, packed, batch, mask)

    def _advanced(
        self,
        accumulator: Accumulator,
        given: Given | None,
        state: TrainState,
        packed: Any,
        batch: Batch,
        mask: Any,
    ) -> tuple[TrainState, Any, Updated]:
        done = self._attempt(given, state, batch, mask)
        values = done.told(state)
        new_state, merged = update_hooks(self._hooks, values), packed
        for outputs in done.outputs:
            merged = self.merge_metrics(accumulator, merged, outputs)
        keep = admitted(self._hooks, new_state.hooks, values)
        if keep is not None:
            merged = select(keep, merged, packed)
        if done.weight is not None:
            new_state, keep = unless_weightless(self._hooks, done.weight, values, new_state, keep)
        if keep is not None:
            again, one_device = self._again(done), self.strategy.takes_host_batches
            new_state = settle(self._hooks, keep, values, new_state, again, one_device=one_device)
        return new_state, merged, done

    def attempt(
        self, given: Given | None, state: TrainState, batch: Batch, mask: jax.Array | None
    ) -> Updated:
        """One optimizer update, of `batch` and `mask` as `train` takes them, before the hooks are told."""
        with self.constants.traced(given):
            return self._step(state, self.parts(batch, mask))

    def parts(self, batch: Batch, mask: Any) -> Parts:
        """Returns the batches of a step with their masks, of `batch` and `mask` as `train` takes them."""
        return ((batch, mask),) if self.accumulate == 1 else tuple(zip(batch, mask or (), strict=True))

    def attempt_one(self, given: Given | None, state: TrainState, batch: Batch) -> Updated:
        """One optimizer update of one batch, all of whose rows are real, also where a step takes several."""
        if self.accumulate == 1:
            return self._attempt(given, state, batch, None)
        with self.constants.traced(given):
            return self._step(state, ((batch, None),))

    @functools.cached_property
    def _attempt(self) -> Any:
        return _traced_once(self.attempt)

    def trace(self, state: TrainState, batch: Batch) -> jax.stages.Traced:
        """Returns the trace of one update on one device, before the hooks; starts no device.

        Args:
            state: shapes and dtypes.
            batch: shapes and dtypes, leaves `[batch, ...]`.
        """
        parts = (batch, None) if self.accumulate == 1 else ((batch,), (None,))
        return self._attempt.trace(self.constants.spec(), state, *parts)

    def default_update(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        """What `Trainer.train_step` does unless it is overridden: every row of `batch` is real."""
        self._default_is_used = True
        done = self._update(state, ((batch, None),))
        new_state = done.state
        if done.weight is not None:
            new_state = select(done.weight != 0, new_state, state.replace(step=new_state.step))
        return new_state, done.outputs[0]

    def _step(self, state: TrainState, parts: Parts) -> Updated:
        if self._user.train_step is None:
            return self._update(state, parts)
        ((batch, _),) = parts
        new_state, outputs = check_step_result(self._user.train_step(state, batch))
        if not self._default_is_used:
            check_unused(self._precision, self._remat)
        loss = outputs.get("loss")
        if loss is not None:  # hooks are told the same on every replica
            loss = self._mean_told(jnp.asarray(loss), outputs)
        # One call is one step of every log and cadence, however many optimizers moved in it.
        new_state = new_state.replace(step=state.step + 1)
        outputs = [{**self.forward.mask_output(batch, None), **outputs}]
        return Updated(new_state, loss, None, None, None, outputs, per_example=False)

    def _mean_told(self, loss: jax.Array, outputs: Outputs) -> jax.Array:
        if not self.is_weighted(outputs):
            return self.strategy.sum(loss.mean()) / self.strategy.sum(1)
        mean, weight = quotient(Weighted(loss, outputs["weight"]), None)
        return self.strategy.sum(of_all(weight, self.strategy.sum(weight), mean))

    def is_weighted(self, outputs: Outputs) -> bool:
        """Says whether `loss` and `weight` in the outputs of a step are those of weighted losses."""
        return self.forward.weighted and {"loss", "weight"} <= outputs.keys()

    def _update(self, state: TrainState, parts: Parts) -> Updated:
        passes, model_state = self._passes(state, parts), state.model_state
        for one in passes:
            model_state = {**model_state, **one.updated}
        loss, weight, grads, shares = self._joined(state, passes)
        outputs = [
            for_metrics(one.losses, one.outputs, mask, self.forward.rows(batch))
            for one, (batch, mask) in zip(passes, parts, strict=True)
        ]
        # The scales of fp8 are largest values: over all batches and replicas they are those of the joined batch.
        replaced = self.strategy.max(functools.reduce(_larger, (one.replaced for one in passes)))
        merged = {**self.strategy.merge_collections(model_state), **replaced}
        if self._precision.scaled:
            scale = state.hooks[LOSS_SCALE].scale
            skipped = (~all_finite(grads)).astype(jnp.float32)
            seen = {"loss_scale": scale, "skipped_updates": skipped, "part": jnp.float32(1 / len(parts))}
            outputs = [{**one, **seen} for one in outputs]
        new_state, per_example = self._apply(state, grads, merged), is_per_example(passes[0].losses)
        return Updated(new_state, loss, weight, grads, merged, outputs, per_example, shares)

    def gradient(self, state: TrainState, parts: Parts) -> tuple[jax.Array | None, PyTree]:
        """Returns the sum of the weights of these batches, None where they have none, and their gradient."""
        return self._joined(state, self._passes(state, parts))[1:3]

    def _passes(self, state: TrainState, parts: Parts) -> list[Pass]:
        examples, model_state, passes = self._examples(parts), state.model_state, []
        for index, (batch, mask) in enumerate(parts):
            key = self.part_key(state, index)
            passes.append(self._pass(state, model_state, batch, mask, key, examples))
            model_state = {**model_state, **passes[-1].updated}
        return passes

    def part_key(self, state: TrainState, index: int) -> jax.Array:
        """Returns the key of one batch of a step."""
        return step_key(state) if self.accumulate == 1 else jax.random.fold_in(step_key(state), index)

    def _joined(
        self, state: TrainState, passes: list[Pass]
    ) -> tuple[jax.Array, jax.Array | None, PyTree, list[Share]]:
        """Returns the loss of the step, the sum of its weights where it has any, the gradient, and the batches' shares.

        There are shares where a step is made of several batches.
        """
        shares = [(one.loss, one.grads) for one in passes]
        weights = [one.weight for one in passes if one.weight is not None]
        total = self.strategy.sum(functools.reduce(jnp.add, weights)) if weights else None
        if total is not None and (len(passes) > 1 or self.strategy.replica_axis is not None):
            shares = [of_all(weight, total, share) for weight, share in zip(weights, shares, strict=True)]
        summed = functools.reduce(functools.partial(jax.tree.map, jnp.add), shares)
        loss, grads = self.strategy.sum(summed)
        moving = self._moving(state.params)

        def whole(grads: PyTree) -> PyTree:
            return with_zeros(grads, state.params, moving)

        several = self.accumulate > 1
        kept = [
            Share(one.weight, whole(grads)) for one, (_, grads) in zip(passes, shares, strict=True) if several
        ]
        return loss, total, whole(self.unscaled(state, grads)), kept

    def unscaled(self, state: TrainState, grads: PyTree) -> PyTree:
        """Returns gradients without the loss scale."""
        if not self._precision.scaled:
            return grads
        scale = state.hooks[LOSS_SCALE].scale
        return jax.tree.map(lambda grad: grad / scale.astype(grad.dtype), grads)

    def _apply(self, state: TrainState, grads: PyTree, model_state: dict[str, Any]) -> TrainState:
        new_state = state.apply_gradients(grads=grads, model_state=model_state)
        params = with_still(new_state.params, state.params, self._moving(state.params))
        new_state = new_state.replace(params=params)
        if not self._precision.scaled:
            return new_state
        finite, memory = all_finite(grads), state.hooks[LOSS_SCALE]
        new_state = select(finite, new_state, state.replace(step=new_state.step))
        return new_state.replace(hooks={**state.hooks, LOSS_SCALE: adjusted(memory, finite)})

    def _moving(self, params: PyTree) -> list[bool] | None:
        """Returns for each leaf of the parameters whether the step that is being traced trains it; None for all."""
        return self._tx.moving(params) if isinstance(self._tx, Staged) else None

    def _again(self, done: Updated) -> Apply | None:
        """Returns the update that was done as a function of the state before it; None where only the user can."""
        if done.model_state is None:
            return None
        return functools.partial(self._apply, grads=done.grads, model_state=done.model_state)

    def _pass(
        self,
        state: TrainState,
        model_state: dict[str, Any],
        batch: Batch,
        mask: jax.Array | None,
        rng: jax.Array,
        examples: jax.Array | None,
    ) -> Pass:
        check_trainable(state.params)
        scale = state.hooks[LOSS_SCALE].scale if self._precision.scaled else None

        scales = {name: model_state[name] for name in (OVERWRITTEN,) if name in model_state}
        check_scales(scales, one_example=self.forward.sees_one_example)

        trained, joined = split(state.params, self._moving(state.params))

        def objective(trained: PyTree, scales: dict[str, Any]) -> tuple[jax.Array, tuple[Any, ...]]:
            variables = {**model_state, **scales, "params": joined(trained)}
            losses, outputs, updated = self.forward.losses(
                variables, batch, mask, state.step, rng, train=True
            )
            if isinstance(losses, Weighted):
                loss, weight = quotient(losses, mask)
            else:
                loss, weight = mean_share(losses, mask, self.forward.rows(batch) or 1, examples), None
            return loss if scale is None else loss * scale, (loss, weight, losses, outputs, updated)

        gradient = jax.grad(objective, argnums=(0, 1), has_aux=True)
        (grads, replaced), (loss, weight, losses, outputs, updated) = gradient(trained, scales)
        return Pass(loss, weight, losses, outputs, updated, grads, replaced)

    def _examples(self, parts: Parts) -> jax.Array | None:
        """Returns the real examples of the whole step, None where it is one batch of one program."""
        if len(parts) == 1 and self.strategy.replica_axis is None:
            return None
        counts = [self.forward.real(batch, mask).sum() for batch, mask in parts]
        return jnp.maximum(self.strategy.sum(jnp.stack(counts).sum()), 1)

    def row_losses(
        self, impl: str, given: Given | None, state: TrainState, batch: Batch, mask: jax.Array | None
    ) -> dict[str, jax.Array]:
        """Returns the losses that a training step computes, and their weights where they have any, all `[batch]`.

        Args:
            impl: of the key in `state`.
            given: beside state and batch.
            state: its key is raw.
            batch: leaves `[batch, ...]`.
            mask: `bool[batch]`.
        """
        state = with_typed_key(state, impl)
        with self.constants.traced(given):
            losses, _, _ = self.forward.losses(
                state.variables, batch, mask, state.step, step_key(state), train=True
            )
        told = for_metrics(losses, {}, mask, self.forward.rows(batch))
        return {name: told[name] for name in ("loss", "weight") if name in told}

    @property
    def has_own_train(self) -> bool:
        """Whether the user wrote `train_step`, which may return any state."""
        return self._user.train_step is not None


def _traced_once(fn: Callable[..., Any]) -> Any:
    """Returns `fn` such that arguments of the same shapes are traced once for all programs that hold it.

    Tracing a model takes as long as compiling a small one, and it is looked at before it is compiled.
    """
    return jax.jit(fn, inline=True)


_larger = functools.partial(jax.tree.map, jnp.maximum)
