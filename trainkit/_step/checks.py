"""What is refused of the values that a user's methods return, with the cure. Owns no step."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp

from trainkit._core.state import TrainState
from trainkit._core.tree import describe, differences, path_name, signature

_RESERVED = ("loss", "mask")
_TRAINABLE = ("float", "bfloat", "complex")


@contextlib.contextmanager
def explained_errors() -> Iterator[None]:
    """Turns errors of the libraries below that mean a known mistake into ones that name the cure."""
    try:
        yield
    except flax.errors.ModifyScopeVariableError as error:
        error.add_note(
            "trainkit: training keeps changes of every collection but params, evaluation and prediction of none. "
            "Let the layer write only where self.is_mutable_collection(name) is true, or pass it train=ctx.train."
        )
        raise
    except NameError as error:
        match = re.search(r"unbound axis name: (\w+)", str(error))
        if match is None:
            raise
        raise ValueError(
            f"a layer of the model reduces over an axis named {match[1]!r}, e.g. nn.BatchNorm(axis_name={match[1]!r}), "
            "which this strategy does not bind. Use axis_name='batch', or none: under strategy='jit' batch statistics "
            "are over the whole batch already."
        ) from error


@contextlib.contextmanager
def explained_shapes(batch: Any, *, one_example: bool) -> Iterator[None]:
    """Adds to an error that the user's loss raises what it was called with, and where another loss runs."""
    try:
        yield
    except (TypeError, ValueError, IndexError, flax.errors.FlaxError) as error:
        leaves = ", ".join(f"{name} {kind}" for name, kind in signature(batch).items())
        seen = (
            f"ONE example, as strategy='vmap' does: {leaves}. A loss written for the whole batch runs under 'jit'."
            if one_example
            else f"a batch: {leaves}. A loss written for ONE example runs under strategy='vmap'."
        )
        error.add_note(f"trainkit: loss was called with {seen}")
        raise


def check_trainable(params: Any) -> None:
    """Refuses parameters that have no gradient.

    Raises:
        TypeError: some are integers or booleans; the message names them.
    """
    wrong = {
        name: kind for name, kind in signature({"params": params}).items() if not kind.startswith(_TRAINABLE)
    }
    if wrong:
        named = ", ".join(f"{name} {kind}" for name, kind in wrong.items())
        raise TypeError(
            f"parameters must be floats, for they are trained, and these have no gradient: {named}. Keep what is not "
            "trained in a collection of its own, self.variable('constants', name, init), or give it a float dtype."
        )


def check_loss_result(result: object) -> tuple[jax.Array, dict[str, Any]]:
    """Returns what `loss` returned as losses and outputs.

    Raises:
        TypeError: it is not a pair of float losses and a mapping of arrays.
        ValueError: an output has a name that is taken.
    """
    if not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(
            f"loss returned {kind_of(result)}; it must return (losses, outputs): one loss per example, shape "
            "[batch], or a scalar, and a mapping for the metrics, e.g. return losses, {'logits': logits}."
        )
    losses, outputs = result
    if not hasattr(losses, "dtype") and not isinstance(losses, float):
        raise TypeError(
            f"loss returned losses of type {kind_of(losses)}; they must be a float array: one loss per "
            "example, shape [batch], or a scalar."
        )
    losses = jnp.asarray(losses)
    if not jnp.issubdtype(losses.dtype, jnp.floating):
        raise TypeError(
            f"loss returned losses of dtype {losses.dtype}; gradients need a float dtype. Use operations "
            "that keep floats, or losses.astype(jnp.float32)."
        )
    check_outputs("loss", outputs)
    taken = [name for name in _RESERVED if name in outputs]
    if taken:
        raise ValueError(
            f"loss returned outputs named {taken}; trainkit adds loss and mask itself. Rename yours, e.g. 'token_mask'."
        )
    return losses, dict(outputs)


def check_step_result(result: object) -> tuple[TrainState, dict[str, Any]]:
    """Returns what an overridden `train_step` returned.

    Raises:
        TypeError: it is not a pair of a state and a mapping of arrays.
    """
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], TrainState)):
        raise TypeError(
            f"train_step returned {kind_of(result)}; it must return (state, outputs): the new TrainState and "
            "a mapping for the metrics, e.g. return state.apply_gradients(grads=grads), {'loss': loss}."
        )
    check_outputs("train_step", result[1])
    return result


def check_carried(old: TrainState, new: TrainState, after: Callable[[], TrainState]) -> None:
    """Refuses a `train_step` after which the state has another structure, or other shapes at every step.

    A collection may take its final shapes at the first step, as some layers do: the step compiles once more.

    Args:
        old: the state before a step.
        new: the state after it.
        after: returns the state one step later.
    """
    changed = differences(signature(old), signature(new))
    if not changed:
        return
    only_model_state = signature(old.replace_model_state(new.model_state)) == signature(new)
    same_paths = signature(old).keys() == signature(new).keys()
    if only_model_state and same_paths and signature(after()) == signature(new):
        return
    raise ValueError(
        "train_step returned a state of another structure than it was given: "
        f"{'; '.join(changed)}. Return state.replace(...) or state.apply_gradients(...) of the same fields."
    )


def check_losses(losses: jax.Array, rows: int, *, one_example: bool) -> None:
    """Refuses losses that are neither `[rows]` nor a scalar.

    Args:
        losses: of the whole batch.
        rows: of the batch.
        one_example: whether the loss was called with one example at a time.
    """
    if losses.ndim == 0 or losses.shape == (rows,):
        return
    if one_example:
        raise ValueError(
            f"loss returned losses of shape {list(losses.shape[1:])} for one example; under strategy='vmap' it is "
            "called with ONE example, without a batch dimension, and returns a scalar. Sum or average the other axes, "
            "e.g. losses.mean(); a loss written for the whole batch runs under strategy='jit'."
        )
    raise ValueError(
        f"loss returned losses of shape {list(losses.shape)} for a batch of {rows}; allowed are [{rows}], one per "
        "example, and a scalar. Sum or average the other axes, e.g. losses.mean(axis=-1); a loss written for ONE "
        "example runs under strategy='vmap' and returns a scalar there."
    )


def check_outputs(method: str, outputs: object) -> None:
    """Refuses outputs of `method` that are not a mapping of arrays."""
    if not isinstance(outputs, Mapping):
        raise TypeError(
            f"{method} returned outputs of type {kind_of(outputs)}; it must be a mapping of names to arrays."
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(dict(outputs)):
        if not hasattr(leaf, "shape") and not isinstance(leaf, (int, float)):
            raise TypeError(
                f"{method} returned the output {path_name(path)} of type {kind_of(leaf)}; outputs must be arrays."
            )


def kind_of(value: object) -> str:
    """Returns what `value` is in a few words."""
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return describe(value)
