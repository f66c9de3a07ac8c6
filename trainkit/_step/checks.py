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
from trainkit._core.weighted import Weighted
from trainkit._models.precision import Precision

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
    except KeyError as error:
        leaves = ", ".join(f"{name} {kind}" for name, kind in signature(batch).items())
        error.add_note(
            f"trainkit: loss was called with {leaves}. A leaf of strings or objects stays on the host: encode it as "
            "numbers to use it in a loss."
        )
        raise
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


def check_loss_result(result: object) -> tuple[Any, dict[str, Any]]:
    """Returns what `loss` returned as losses, an array or `Weighted`, and outputs.

    Raises:
        TypeError: it is not a pair of float losses and a mapping of arrays.
        ValueError: an output has a name that is taken.
    """
    if not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(
            f"loss returned {kind_of(result)}; it must return (losses, outputs): one loss per example, shape "
            "[batch], tk.Weighted(losses, weights), or a scalar, and a mapping for the metrics, e.g. "
            "return losses, {'logits': logits}."
        )
    losses, outputs = result
    reserved = (*_RESERVED, "weight") if isinstance(losses, Weighted) else _RESERVED
    losses = _weighted(losses) if isinstance(losses, Weighted) else _plain(losses)
    check_outputs("loss", outputs)
    taken = [name for name in reserved if name in outputs]
    if taken:
        raise ValueError(
            f"loss returned outputs named {taken}; trainkit adds {', '.join(reserved)} itself. Rename yours, e.g. "
            "'token_mask'."
        )
    return losses, dict(outputs)


def _plain(losses: object) -> jax.Array:
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
    return losses


def _weighted(weighted: Weighted) -> Weighted:
    """Returns weighted losses in one float dtype, of float32 at least."""
    for part, value in (("losses", weighted.losses), ("weights", weighted.weights)):
        if not hasattr(value, "dtype") and not isinstance(value, (bool, int, float)):
            raise TypeError(
                f"loss returned tk.Weighted with {part} of type {kind_of(value)}; they must be an array."
            )
    losses, weights = _plain(weighted.losses), jnp.asarray(weighted.weights)
    if weights.dtype != jnp.bool_ and not jnp.isdtype(weights.dtype, ("integral", "real floating")):
        raise TypeError(
            f"loss returned tk.Weighted with weights of dtype {weights.dtype}; they must be real or bool."
        )
    if losses.shape != weights.shape:
        raise ValueError(
            f"loss returned tk.Weighted with losses of shape {list(losses.shape)} and weights of shape "
            f"{list(weights.shape)}; both must have one shape, [batch, ...]. One weight for each loss: "
            "jnp.broadcast_to(weights, losses.shape) where several share it, or average the losses that share one."
        )
    dtype = jnp.promote_types(losses.dtype, jnp.float32)
    return Weighted(losses.astype(dtype), jax.lax.stop_gradient(weights).astype(dtype))


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


def check_unused(precision: Precision, remat: bool | Callable[..., bool]) -> None:
    """Refuses settings that do nothing with a `train_step` that never calls the one of trainkit.

    Args:
        precision: of the trainer.
        remat: of the trainer.

    Raises:
        ValueError: names the setting, and the ways out.
    """
    settings = {
        f"precision={precision.compute!r}": (precision.is_mixed, "cast parameters and inputs there"),
        f"remat={remat!r}": (bool(remat), "use nn.remat or jax.checkpoint there"),
    }
    for setting, (is_set, cure) in settings.items():
        if is_set:
            raise ValueError(
                f"{setting} acts in the train_step of trainkit, and this trainer has its own, which does not call it. "
                f"Call super().train_step(state, batch), or {cure} and leave {setting.split('=')[0]} out."
            )


def check_scales(scales: Mapping[str, Any], *, one_example: bool) -> None:
    """Refuses fp8 layers where a gradient is a sum over calls of the model, one for each example.

    Raises:
        ValueError: there are some.
    """
    if scales and one_example:
        raise ValueError(
            f"the model has fp8 layers: their scales in {', '.join(scales)} are largest values over a batch, and under "
            "strategy='vmap' each example is a call of its own. Use strategy='jit' with a loss for the whole batch."
        )


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


def check_losses(losses: jax.Array | Weighted, rows: int | None, *, one_example: bool) -> None:
    """Refuses losses that are neither `[rows]` nor a scalar, and weighted ones that are not `[rows, ...]`.

    Args:
        losses: of the whole batch.
        rows: of the batch, None where it is one unit: weighted losses then have any shape.
        one_example: whether the loss was called with one example at a time.
    """
    if rows is None:
        if not isinstance(losses, Weighted) and losses.ndim:
            raise ValueError(
                f"loss returned losses of shape {list(losses.shape)} for a batch that is one unit (batch_axis = None); "
                "allowed are a scalar and tk.Weighted(losses, weights), e.g. with a weight for each graph."
            )
        return
    if isinstance(losses, Weighted):
        if losses.losses.shape[:1] != (rows,):
            raise ValueError(
                f"loss returned tk.Weighted of shape {list(losses.losses.shape)} for a batch of {rows}; allowed is "
                f"[{rows}, ...], the losses of each example in its row. A batch that is one unit, such as a graph, is "
                "declared by batch_axis = None on the trainer."
            )
        return
    if losses.ndim == 0 or losses.shape == (rows,):
        return
    if one_example:
        raise ValueError(
            f"loss returned losses of shape {list(losses.shape[1:])} for one example; under strategy='vmap' it is "
            "called with ONE example, without a batch dimension, and returns a scalar. Sum or average the other axes, "
            "e.g. losses.mean(), or return tk.Weighted(losses, weights); a loss written for the whole batch runs "
            "under strategy='jit'."
        )
    raise ValueError(
        f"loss returned losses of shape {list(losses.shape)} for a batch of {rows}; allowed are [{rows}], one per "
        "example, and a scalar. Sum or average the other axes, e.g. losses.mean(axis=-1), or return "
        "tk.Weighted(losses, weights) for a mean over all of them; a loss written for ONE example runs under "
        "strategy='vmap' and returns a scalar there."
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
