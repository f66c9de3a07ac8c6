"""Finds mistakes in a collection of metrics before anything is compiled.

Owns the messages; carries no values.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
from clu import metrics

from trainkit._core.tree import describe
from trainkit._core.typing import Outputs
from trainkit.metrics._inputs import output_name


def metric_classes(collection: type[metrics.Collection]) -> dict[str, type[metrics.Metric]]:
    """Returns the metric classes of a collection by name, in order, those of its base classes included.

    Args:
        collection: the collection class.

    Returns:
        A metric class for each name.

    Raises:
        TypeError: if the collection, or one of its metrics, is not what CLU can work with.
    """
    if not (isinstance(collection, type) and issubclass(collection, metrics.Collection)):
        raise TypeError(
            "metrics must be a subclass of clu.metrics.Collection, the class and not an instance; got "
            f"{collection!r}."
        )
    where = collection.__name__
    if "__dataclass_fields__" not in vars(collection):
        raise TypeError(
            f"The collection {where} is not a dataclass. Decorate it with @flax.struct.dataclass."
        )
    fields: Any = dataclasses.fields(collection)  # pyright: ignore[reportArgumentType]
    found = {field.name: field.type for field in fields if field.name != "_reduction_counter"}
    for name, metric in found.items():
        _check_class(where, name, metric)
    return found


def _check_class(where: str, name: str, metric: Any) -> None:
    if isinstance(metric, str):
        raise TypeError(
            f"The metric {name!r} of {where} is annotated with the string {metric!r}, not with a class. "
            "Remove `from __future__ import annotations` from the module that defines the collection."
        )
    if not (isinstance(metric, type) and issubclass(metric, metrics.Metric)):
        raise TypeError(
            f"The metric {name!r} of {where} must be a subclass of clu.metrics.Metric, got {metric!r}."
        )
    if metric.empty.__func__ is metrics.Metric.empty.__func__:
        raise TypeError(
            f"The metric {name!r} ({metric.__name__}) of {where} has no empty(). Give it a classmethod "
            "empty() that returns the metric of no examples, the identity of merge(), e.g. "
            "cls(total=jnp.zeros(()), count=jnp.zeros((), jnp.int32))."
        )
    if issubclass(metric, metrics.Std):
        _check_std(name, metric)


def _check_std(name: str, metric: type[metrics.Metric]) -> None:
    # CLU 0.0.12 calls jnp.clip with an argument that JAX has removed; a later CLU may be fine.
    try:
        with jax.numpy_dtype_promotion("standard"):
            jax.eval_shape(lambda: metric.empty().compute())
    except TypeError as error:
        raise TypeError(
            f"The metric {name!r} ({metric.__name__}) is clu.metrics.Std, whose compute() fails with the "
            f"installed JAX: {error}. Use trainkit.metrics.Std, which has the same from_output()."
        ) from error


def metric_spec(name: str, metric: type[metrics.Metric], outputs: Outputs) -> metrics.Metric:
    """Returns shapes and dtypes of a metric of one batch.

    Args:
        name: the metric's name in the collection.
        metric: its class.
        outputs: shapes and dtypes of everything that the metric is given.

    Returns:
        The metric with `jax.ShapeDtypeStruct` leaves.

    Raises:
        ValueError: if an output is missing, the mask doesn't fit, or the metric refuses its input.
        TypeError: if labels are not of the dtype that the metric takes.
    """
    _check_mask(name, metric, outputs)
    try:
        return jax.eval_shape(lambda given: metric.from_model_output(**given), dict(outputs))
    except Exception as error:
        raise _explained(name, metric, outputs, error) from error


def _check_mask(name: str, metric: type[metrics.Metric], outputs: Outputs) -> None:
    output, mask = output_name(metric), outputs.get("mask")
    value = outputs.get(output) if output else None
    if mask is None or value is None or not value.ndim or value.shape[0] == mask.shape[0]:
        return
    raise ValueError(
        f"The metric {name!r} takes the output {output!r}, {describe(value)}, but the mask is "
        f"{describe(mask)}: CLU would ignore the mask and count padded examples. Return one row per "
        "example, or reduce the output to a scalar."
    )


def _missing(error: Exception, outputs: Outputs) -> list[str]:
    """Returns the outputs that a metric asked for and that aren't there."""
    if isinstance(error, KeyError):
        names = [error.args[0]] if error.args and isinstance(error.args[0], str) else []
    elif isinstance(error, TypeError) and "missing" in str(error):
        names = re.findall(r"'(\w+)'", str(error).partition("missing")[2])
    else:
        names = []
    return [name for name in names if name not in outputs]


def _explained(name: str, metric: type[metrics.Metric], outputs: Outputs, error: Exception) -> Exception:
    who = f"The metric {name!r} ({metric.__name__})"
    there = ", ".join(f"{key} {describe(value)}" for key, value in outputs.items())
    missing = _missing(error, outputs)
    if missing:
        remedy = f"Return it beside the losses, e.g. return losses, {{{missing[0]!r}: ...}}"
        if missing == ["weight"]:
            remedy = "It is there where loss returns tk.Weighted(losses, weights)"
        if metric in (metrics.Average, metrics.LastValue) or missing == ["values"]:
            remedy = f"Name the output that it takes: {metric.__name__}.from_output('loss')"
        return ValueError(
            f"{who} asks for the output {' and '.join(map(repr, missing))}, which the loss did not return. "
            f"There are: {there}. {remedy}."
        )
    labels = outputs.get("labels")
    if issubclass(metric, metrics.Accuracy) and labels is not None and labels.dtype != jnp.int32:
        return TypeError(
            f"{who} takes labels of dtype int32, got {describe(labels)}. Cast them with .astype(jnp.int32)."
        )
    kind = TypeError if isinstance(error, TypeError) else ValueError
    return kind(f"{who} refused the outputs {there}: {error}")
