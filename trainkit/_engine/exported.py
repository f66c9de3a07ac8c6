"""A trained model as one pure function and the arrays that it takes. Owns no compilation and no file."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from trainkit._core.state import TrainState, key_impl, with_raw_key
from trainkit._core.typing import Batch, PyTree
from trainkit._step.given import Given
from trainkit._step.steps import Steps

Predict = Callable[[PyTree, Batch], PyTree]
"""`predict(arrays, batch)`, pure."""


def predicting(
    steps: Steps, given: Given | None, state: TrainState, axis: str | None
) -> tuple[Predict, PyTree]:
    """Returns a function that predicts on one device, and the arrays it takes: the state, and what steps are given.

    Args:
        steps: of the trainer.
        given: beside state and batch.
        state: the train state.
        axis: of the replicas, None where a step is one program.
    """
    impl, bare = key_impl(state), with_raw_key(state.replace(opt_state=(), hooks={}))
    beside = {name: getattr(given or Given(), name) for name in ("frozen", "hparams")}
    beside = {name: tree for name, tree in beside.items() if jax.tree.leaves(tree)}

    def of_state(state: TrainState, batch: Batch) -> PyTree:
        return steps.prediction(impl, Given(), state, batch, None)

    def of_all(arrays: dict[str, Any], batch: Batch) -> PyTree:
        fields = dict(arrays)
        given = Given(**{name: fields.pop(name) for name in beside})
        return steps.prediction(impl, given, bare.replace(**fields), batch, None)

    # Files name each array by its path: the names of the state are the same with and without others beside it.
    predict, arrays = (of_all, {**_arrays(bare), **beside}) if beside else (of_state, bare)
    return (predict if axis is None else _as_only_replica(predict, axis)), arrays


def _arrays(state: TrainState) -> dict[str, Any]:
    fields = [field for field in dataclasses.fields(state) if field.metadata.get("pytree_node", True)]
    return {field.name: getattr(state, field.name) for field in fields}


def _as_only_replica(fn: Callable[..., PyTree], axis: str) -> Callable[..., PyTree]:
    """Returns `fn` with the axis of the replicas bound, of size 1."""

    def alone(*args: Any) -> PyTree:
        mapped = jax.vmap(lambda _, *inner: fn(*inner), in_axes=(0, *(None for _ in args)), axis_name=axis)
        return jax.tree.map(lambda leaf: leaf[0], mapped(jnp.zeros(1), *args))

    return alone
