"""One abstract run of a step before anything is compiled: refuses what is wrong with it, says what it returns.

Owns the look; not the step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trainkit._core.jaxprs import is_light
from trainkit._core.state import TrainState
from trainkit._core.tree import describe, named_leaves
from trainkit._core.typing import Batch, PyTree
from trainkit._step.checks import check_carried, explained_errors
from trainkit._step.given import Given
from trainkit._step.probes import ProbedSteps
from trainkit._step.steps import Steps
from trainkit.parallel._strategy import Role, Strategy


class Traits(NamedTuple):
    """What one abstract run of a step showed, before anything was compiled.

    Attributes:
        per_example: whether the loss comes one per example, so that padding is exact.
        outputs: shapes and dtypes of what goes to the metrics.
        weighted: whether `loss` and `weight` among them are those of weighted losses.
        light: whether an evaluation step is over sooner than the host can call it, and as well in a loop.
    """

    per_example: bool
    outputs: dict[str, Any]
    weighted: bool = False
    light: bool = False


def inspect_train(
    steps: Steps, strategy: Strategy, given: Given | None, state: TrainState, batch: Batch
) -> Traits:
    """Runs the training step abstractly.

    Args:
        steps: of the trainer.
        strategy: of the trainer.
        given: beside state and batch, as `state`.
        state: arrays, or their shapes and dtypes.
        batch: leaves `[batch, ...]`, arrays or their shapes and dtypes.
    """
    found: dict[str, Any] = {}

    def run(given: Given | None, state: TrainState, batch: Batch) -> TrainState:
        done = steps.attempt_one(given, state, batch)
        found["traits"] = Traits(
            done.per_example, shapes(done.outputs[0]), steps.is_weighted(done.outputs[0])
        )
        return done.state

    shards = 1 if steps.units else strategy.shards
    new_state = _abstractly(run, strategy, given, state, batch, shards)[1]
    if steps.has_own_train:
        check_carried(
            state, new_state, lambda: _abstractly(run, strategy, given, new_state, batch, shards)[1]
        )
    return found["traits"]


def inspect_eval(
    steps: Steps, strategy: Strategy, given: Given | None, state: TrainState, batch: Batch
) -> Traits:
    """Runs the evaluation step abstractly, as `inspect_train`."""
    found: dict[str, Any] = {}

    def run(given: Given | None, state: TrainState, batch: Batch) -> Any:
        per_example, outputs = steps.eval_outputs(given, state, batch, None)
        found["traits"] = Traits(per_example, shapes(outputs), steps.is_weighted(outputs))
        return state.step

    jaxpr = _abstractly(run, strategy, given, state, batch, 1 if steps.units else strategy.shards)[0]
    return found["traits"]._replace(light=is_light(jaxpr))


def evaluation_of(
    steps: Steps, strategy: Strategy, given: Given | None, state: TrainState, batch: Batch
) -> Any:
    """Returns what an evaluation of one batch computes, as a jaxpr."""

    def run(given: Given | None, state: TrainState, batch: Batch) -> Any:
        steps.eval_outputs(given, state, batch, None)
        return state.step

    return _abstractly(run, strategy, given, state, batch, 1 if steps.units else strategy.shards)[0]


def inspect_probed(
    probed: ProbedSteps,
    steps: Steps,
    strategy: Strategy,
    given: Given | None,
    state: TrainState,
    batch: Batch,
) -> Traits:
    """Runs the probes abstractly, so that what one refuses is said before the first step and not where it is due."""

    def run(given: Given | None, state: TrainState, batch: Batch) -> Any:
        values = probed.look(given, state, batch)
        for name, leaf in named_leaves(values):
            if not hasattr(leaf, "shape") and not isinstance(leaf, (int, float)):
                raise TypeError(f"the probe {name} returned {describe(leaf)}; it must return arrays.")
        return state.step

    _abstractly(run, strategy, given, state, batch, 1 if steps.units else strategy.shards)
    return Traits(per_example=False, outputs={})


def _abstractly(
    run: Callable[[Given | None, TrainState, Batch], Any],
    strategy: Strategy,
    given: Given | None,
    state: TrainState,
    batch: Batch,
    shards: int,
) -> Any:
    def divisible(leaf: Any) -> jax.ShapeDtypeStruct:
        shape = jnp.shape(leaf)
        rows = (-(-shape[0] // shards) * shards, *shape[1:]) if shape else ()
        return jax.ShapeDtypeStruct(rows, jax.dtypes.canonicalize_dtype(jnp.result_type(leaf)))

    compiled = strategy.compile(run, inputs=(Role.WHOLE, Role.STATE, Role.ROWS), outputs=Role.STATE)
    with explained_errors():
        trace = jax.make_jaxpr(compiled, return_shape=True)
        return trace(given, state, jax.tree.map(divisible, batch))


def shapes(tree: PyTree) -> PyTree:
    """Returns the shape and dtype of each array of `tree`."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), tree)
