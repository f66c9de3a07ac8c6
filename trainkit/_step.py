"""The pure steps: initialise, train, evaluate, predict. Runs the hooks; owns no loop and no device layout."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainkit._context import StepContext
from trainkit._model import Model
from trainkit._state import TrainState
from trainkit._trace import TraceLog
from trainkit._tree import describe, differences, path_name, signature
from trainkit._typing import Batch, Outputs, PyTree
from trainkit.hooks._hook import StepHook, StepValues, init_hooks, update_hooks
from trainkit.metrics._accumulator import Accumulator
from trainkit.parallel._strategy import Role, Strategy

_RESERVED = ("loss", "mask")


@dataclasses.dataclass(frozen=True)
class UserFunctions:
    """The methods of a trainer that steps are made of; None where the user keeps the default."""

    loss: Callable[..., Any]
    predict_step: Callable[..., Any]
    init_variables: Callable[..., Any] | None = None
    train_step: Callable[..., Any] | None = None
    eval_step: Callable[..., Any] | None = None


class Traits(NamedTuple):
    """What one abstract run of a step showed, before anything was compiled.

    Attributes:
        per_example: whether the loss comes one per example, so that padding is exact.
        outputs: shapes and dtypes of what goes to the metrics.
    """

    per_example: bool
    outputs: dict[str, Any]


class Gradients(NamedTuple):
    """Result of one pass forward and back."""

    loss: jax.Array
    losses: jax.Array
    outputs: dict[str, Any]
    updated: dict[str, Any]
    grads: PyTree


class Steps:
    """The pure steps of one trainer, for its model, optimizer, hooks and strategy."""

    def __init__(
        self,
        *,
        model: Model,
        tx: optax.GradientTransformation,
        strategy: Strategy,
        hooks: tuple[StepHook, ...],
        user: UserFunctions,
    ) -> None:
        self._model, self._tx, self._strategy, self._hooks, self._user = model, tx, strategy, hooks, user
        self.traces = TraceLog()

    # Initialisation -------------------------------------------------------------------------------------------

    def init(self, rng: jax.Array, batch: Batch) -> TrainState:
        """Returns the state at step 0 from `rng` and the shapes of `batch`; to be compiled as one program."""
        init_rng, step_rng = jax.random.split(rng)
        init_variables = self._user.init_variables or self.init_variables
        state = TrainState.from_variables(
            apply_fn=self._model.apply_fn,
            variables=init_variables(init_rng, batch),
            tx=self._tx,
            rng=step_rng,
        )
        return init_hooks(self._hooks, state)

    def init_variables(self, rng: jax.Array, batch: Batch) -> dict[str, Any]:
        """Returns the variables that one call of the loss creates."""
        mask = self._strategy.example(_all_real(batch))
        ctx = StepContext(train=True, step=jnp.zeros((), jnp.int32), rng=rng, mask=mask)
        return self._model.init(self._checked_loss, rng, self._strategy.example(batch), ctx)

    # Training -------------------------------------------------------------------------------------------------

    def train(
        self, accumulator: Accumulator, impl: str, state: TrainState, packed: Any, batch: Batch, mask: jax.Array | None
    ) -> tuple[TrainState, Any]:
        """One optimizer update, its hooks and its metrics.

        Args:
            accumulator: of the training metrics.
            impl: of the key in `state`.
            state: donated; its key is raw, see `with_raw_key`.
            packed: what `accumulator` carries.
            batch: leaves `[batch, ...]`.
            mask: `bool[batch]`, None when every row is real.

        Returns:
            The next state and the next `packed`.
        """
        self.traces.record("training", {"state": state, "batch": batch, "mask": mask})
        state = with_typed_key(state, impl)
        if self._user.train_step is None:
            new_state, gradients, outputs = self._update(state, batch, mask)
            loss, grads = gradients.loss, gradients.grads
        else:
            new_state, outputs = self._custom_update(state, batch)
            loss, grads = jnp.mean(jnp.asarray(outputs.get("loss", jnp.nan))), None
        new_state = update_hooks(self._hooks, StepValues(new_state, loss, grads))
        return with_raw_key(new_state), self._accumulate(accumulator, packed, outputs)

    def default_update(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        """What `Trainer.train_step` does unless it is overridden: every row of `batch` is real."""
        new_state, _, outputs = self._update(state, batch, None)
        return new_state, outputs

    def _update(
        self, state: TrainState, batch: Batch, mask: jax.Array | None
    ) -> tuple[TrainState, Gradients, dict[str, Any]]:
        gradients = self._gradients(state, batch, mask)
        new_state = state.apply_gradients(grads=gradients.grads, model_state=gradients.updated)
        return new_state, gradients, self._for_metrics(gradients.losses, gradients.outputs, batch, mask)

    def _custom_update(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        assert self._user.train_step is not None
        result = self._user.train_step(state, batch)
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], TrainState)):
            raise TypeError(
                f"train_step returned {_kind(result)}; it must return (state, outputs): the new TrainState and "
                "a mapping for the metrics, e.g. return state.apply_gradients(grads=grads), {'loss': loss}."
            )
        new_state, outputs = result
        _check_outputs("train_step", outputs)
        # One call is one step of every log and cadence, however many optimizers moved in it.
        return new_state.replace(step=state.step + 1), {"mask": _all_real(batch), **outputs}

    def _gradients(self, state: TrainState, batch: Batch, mask: jax.Array | None) -> Gradients:
        forward = self._strategy.map_forward(self._forward(train=True))
        rng = _step_key(state)

        def objective(params: PyTree) -> tuple[jax.Array, tuple[Any, ...]]:
            variables = {**state.model_state, "params": params}
            losses, outputs, updated = forward(variables, batch, _or_all_real(mask, batch), state.step, rng)
            _check_losses(losses, batch)
            return self._share(losses, mask, batch), (losses, outputs, updated)

        (loss, (losses, outputs, updated)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        loss, grads = self._strategy.sum((loss, grads))
        return Gradients(loss, losses, outputs, self._strategy.merge_collections(updated), grads)

    def _share(self, losses: jax.Array, mask: jax.Array | None, batch: Batch) -> jax.Array:
        """Returns this program's share of the mean loss over the real examples: the mean itself when it is alone."""
        if self._strategy.replica_axis is None:
            return _mean(losses, mask)
        count = jnp.asarray(batch_rows(batch)) if mask is None or losses.ndim == 0 else mask.sum()
        total = losses * count if losses.ndim == 0 else jnp.where(_or_all_real(mask, batch), losses, 0).sum()
        return total / jnp.maximum(self._strategy.sum(count), 1).astype(losses.dtype)

    def _accumulate(self, accumulator: Accumulator, packed: Any, outputs: Outputs) -> Any:
        return accumulator.update(packed, axis_name=self._strategy.replica_axis, **outputs)

    # Evaluation and prediction --------------------------------------------------------------------------------

    def evaluate(
        self, accumulator: Accumulator, impl: str, state: TrainState, carry: Any, batch: Batch, mask: jax.Array | None
    ) -> tuple[Any, dict[str, Any]]:
        """Metrics of one batch merged into `carry`, a pair of `packed` and `int32[]` examples counted.

        Returns:
            The next `carry`, and the rows that metrics computed on the host ask for.
        """
        self.traces.record("evaluation", {"state": state, "batch": batch, "mask": mask})
        packed, counted = carry
        outputs = self._eval_outputs(with_typed_key(state, impl), batch, mask)
        packed = self._accumulate(accumulator, packed, outputs)
        counted = counted + self._strategy.sum(_or_all_real(mask, batch).sum(dtype=jnp.int32))
        return (packed, counted), accumulator.collect(**outputs)

    def default_eval(self, state: TrainState, batch: Batch, mask: jax.Array | None = None) -> dict[str, Any]:
        """What `Trainer.eval_step` does unless it is overridden: the loss with `ctx.train` False."""
        return self._eval_forward(state, batch, mask)[1]

    def _eval_forward(
        self, state: TrainState, batch: Batch, mask: jax.Array | None
    ) -> tuple[jax.Array, dict[str, Any]]:
        forward = self._strategy.map_forward(self._forward(train=False))
        real = _or_all_real(mask, batch)
        losses, outputs, _ = forward(state.variables, batch, real, state.step, _step_key(state))
        _check_losses(losses, batch)
        return losses, self._for_metrics(losses, outputs, batch, mask)

    def predict(self, impl: str, state: TrainState, batch: Batch, mask: jax.Array | None) -> PyTree:
        """Outputs of `predict_step` for one batch, leaves `[batch, ...]`."""
        self.traces.record("prediction", {"state": state, "batch": batch, "mask": mask})
        state = with_typed_key(state, impl)

        def forward(variables: Any, batch: Batch, mask: jax.Array, step: jax.Array, rng: jax.Array) -> Any:
            ctx = StepContext(train=False, step=step, rng=rng, mask=mask)
            result, _ = self._model.apply(self._user.predict_step, variables, rng, batch, ctx, train=False)
            return result, {}, {}

        mapped = self._strategy.map_forward(forward)
        return mapped(state.variables, batch, _or_all_real(mask, batch), state.step, _step_key(state))[0]

    def _eval_outputs(self, state: TrainState, batch: Batch, mask: jax.Array | None) -> dict[str, Any]:
        if self._user.eval_step is None:
            return self.default_eval(state, batch, mask)
        outputs = self._user.eval_step(state, batch)
        _check_outputs("eval_step", outputs)
        return {**outputs, "mask": _or_all_real(mask, batch)}

    # Looking before compiling ---------------------------------------------------------------------------------

    def inspect_train(self, state: TrainState, batch: Batch) -> Traits:
        """Runs the training step abstractly: refuses what is wrong with it, and says what it returns."""
        found: dict[str, Any] = {}

        def run(state: TrainState, batch: Batch) -> TrainState:
            if self._user.train_step is None:
                new_state, gradients, outputs = self._update(state, batch, None)
                found["traits"] = Traits(gradients.losses.ndim == 1, shapes(outputs))
            else:
                new_state, outputs = self._custom_update(state, batch)
                found["traits"] = Traits(False, shapes(outputs))
            return new_state

        new_state = self._abstractly(run, state, batch)
        changed = differences(signature(state), signature(new_state))
        if changed and self._user.train_step is not None:
            raise ValueError(
                "train_step returned a state of another structure than it was given: "
                f"{'; '.join(changed)}. Return state.replace(...) or state.apply_gradients(...) of the same fields."
            )
        return found["traits"]

    def inspect_eval(self, state: TrainState, batch: Batch) -> Traits:
        """Runs the evaluation step abstractly, as `inspect_train`."""
        found: dict[str, Any] = {}

        def run(state: TrainState, batch: Batch) -> jax.Array:
            per_example = True
            if self._user.eval_step is None:
                losses, outputs = self._eval_forward(state, batch, None)
                per_example = losses.ndim == 1
            else:
                outputs = self._eval_outputs(state, batch, None)
            found["traits"] = Traits(per_example, shapes(outputs))
            return state.step

        self._abstractly(run, state, batch)
        return found["traits"]

    def _abstractly(self, run: Callable[[TrainState, Batch], Any], state: TrainState, batch: Batch) -> Any:
        shards = self._strategy.shards

        def divisible(leaf: Any) -> jax.ShapeDtypeStruct:
            shape = jnp.shape(leaf)
            rows = (-(-shape[0] // shards) * shards, *shape[1:]) if shape else ()
            return jax.ShapeDtypeStruct(rows, jax.dtypes.canonicalize_dtype(jnp.result_type(leaf)))

        compiled = self._strategy.compile(run, inputs=(Role.STATE, Role.ROWS), outputs=Role.STATE)
        with explained_errors():
            return jax.eval_shape(compiled, state, jax.tree.map(divisible, batch))

    # Pieces ---------------------------------------------------------------------------------------------------

    def _forward(self, *, train: bool) -> Callable[..., Any]:
        def forward(variables: Any, batch: Batch, mask: jax.Array, step: jax.Array, rng: jax.Array) -> Any:
            ctx = StepContext(train=train, step=step, rng=rng, mask=mask)
            (losses, outputs), updated = self._model.apply(
                self._checked_loss, variables, rng, batch, ctx, train=train
            )
            # What was sown was for the loss to read back; the state carries the collections it began with.
            carried = {name: updated[name] for name in variables if train and name in updated}
            return losses, outputs, carried

        return forward

    def _checked_loss(self, module: Any, batch: Batch, ctx: StepContext) -> tuple[jax.Array, dict[str, Any]]:
        result = self._user.loss(module, batch, ctx)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(
                f"loss returned {_kind(result)}; it must return (losses, outputs): one loss per example, shape "
                "[batch], or a scalar, and a mapping for the metrics, e.g. return losses, {'logits': logits}."
            )
        losses, outputs = jnp.asarray(result[0]), result[1]
        if not jnp.issubdtype(losses.dtype, jnp.floating):
            raise TypeError(f"loss returned losses of dtype {losses.dtype}; gradients need a float dtype.")
        _check_outputs("loss", outputs)
        taken = [name for name in _RESERVED if name in outputs]
        if taken:
            raise ValueError(
                f"loss returned outputs named {taken}; trainkit adds loss and mask itself. Rename yours, "
                "e.g. 'token_mask'."
            )
        return losses, dict(outputs)

    def _for_metrics(
        self, losses: jax.Array, outputs: Outputs, batch: Batch, mask: jax.Array | None
    ) -> dict[str, Any]:
        # A scalar loss counts once per example, so that means over batches of unequal size are exact.
        rows = jnp.broadcast_to(losses, (batch_rows(batch),)) if losses.ndim == 0 else losses
        return {**outputs, "loss": rows, "mask": _or_all_real(mask, batch)}


@contextlib.contextmanager
def explained_errors() -> Iterator[None]:
    """Turns errors of the libraries below that mean a known mistake into ones that name the cure."""
    try:
        yield
    except NameError as error:
        match = re.search(r"unbound axis name: (\w+)", str(error))
        if match is None:
            raise
        raise ValueError(
            f"a layer of the model reduces over an axis named {match[1]!r}, e.g. nn.BatchNorm(axis_name={match[1]!r}), "
            "which this strategy does not bind. Use axis_name='batch', or none: under strategy='jit' batch statistics "
            "are over the whole batch already."
        ) from error


def with_raw_key(state: TrainState) -> TrainState:
    """Returns `state` with its key as plain `uint32` data: a typed key costs Python work at each call of a step."""
    return state.replace(rng=jax.random.key_data(state.rng))


def with_typed_key(state: TrainState, impl: str) -> TrainState:
    """Undoes `with_raw_key`."""
    return state.replace(rng=jax.random.wrap_key_data(state.rng, impl=impl))


def shapes(tree: PyTree) -> PyTree:
    """Returns the shape and dtype of each array of `tree`."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), tree)


def batch_rows(batch: Batch) -> int:
    """Returns the leading dimension of `batch`."""
    return next(leaf.shape[0] for leaf in jax.tree.leaves(batch) if leaf.ndim)


def _step_key(state: TrainState) -> jax.Array:
    # Costs nothing where the loss draws no numbers: the compiler drops it.
    return jax.random.fold_in(state.rng, state.step)


def _all_real(batch: Batch) -> jax.Array:
    return jnp.ones((batch_rows(batch),), bool)


def _or_all_real(mask: jax.Array | None, batch: Batch) -> jax.Array:
    return _all_real(batch) if mask is None else mask


def _mean(losses: jax.Array, mask: jax.Array | None) -> jax.Array:
    if losses.ndim == 0:
        return losses
    if mask is None:
        return losses.mean()
    return jnp.where(mask, losses, 0).sum() / jnp.maximum(mask.sum(), 1).astype(losses.dtype)


def _check_losses(losses: jax.Array, batch: Batch) -> None:
    rows = batch_rows(batch)
    if losses.ndim == 0 or losses.shape == (rows,):
        return
    raise ValueError(
        f"loss returned losses of shape {list(losses.shape)} for a batch of {rows}; allowed are [{rows}], one per "
        "example, and a scalar. Sum or average the other axes, e.g. losses.mean(axis=-1); a loss written for ONE "
        "example runs under strategy='vmap' and returns a scalar there."
    )


def _check_outputs(method: str, outputs: object) -> None:
    if not isinstance(outputs, Mapping):
        raise TypeError(
            f"{method} returned outputs of type {_kind(outputs)}; it must be a mapping of names to arrays."
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(dict(outputs)):
        if not hasattr(leaf, "shape") and not isinstance(leaf, (int, float)):
            raise TypeError(
                f"{method} returned the output {path_name(path)} of type {_kind(leaf)}; outputs must be arrays."
            )


def _kind(value: object) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return describe(value)
