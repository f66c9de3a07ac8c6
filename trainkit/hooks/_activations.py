"""What the layers of a model return in a step, in a few numbers, as a probe. Owns the numbers and their names."""

import functools
import math

import jax
import jax.numpy as jnp

from trainkit.hooks._hook import StepValues
from trainkit.hooks._numbers import Numbers
from trainkit.hooks._passes import Captured, StepPasses
from trainkit.hooks._probe import StepProbe

NEAR = 0.99
"""From which value on what tanh or a sigmoid returned is near its bound."""

_Batch = tuple[jax.Array, jax.Array]
"""Outputs `float32[rows, ...]` and the mask of their rows, of rank 1 as the outputs have."""


def activations_probe(name: str) -> StepProbe:
    """Returns the probe; see `trainkit.callbacks.ActivationStats` for what it finds."""

    def fn(values: StepValues) -> Numbers:
        assert values.passes is not None  # the step always answers a probe
        captured = values.passes.captured("ActivationStats")
        layers = {path: _outputs(captured, path) for path in captured[0].outputs}
        layers = {path: calls for path, calls in layers.items() if calls}
        if len(layers) > 1:
            layers.pop("", None)  # what the model returns its last layer returned
        found: dict[str, jax.Array] = {}
        for path, calls in layers.items():
            prefix = f"activations/{path or '(root)'}"
            found |= {f"{prefix}/{key}": value for key, value in _numbers(values.passes, calls).items()}
        return Numbers.of(found)

    return StepProbe(name, fn)


def _outputs(captured: list[Captured], path: str) -> list[list[_Batch]]:
    """Returns what a module returned, by call, and for each call by batch of the step."""
    calls = []
    for call, first in enumerate(captured[0].outputs[path]):
        if not jnp.issubdtype(first.dtype, jnp.floating) or first.shape[:1] != captured[0].mask.shape:
            continue
        of_call = [(one.outputs[path][call].astype(jnp.float32), one.mask) for one in captured]
        calls.append([(x, mask.reshape(mask.shape + (1,) * (x.ndim - 1))) for x, mask in of_call])
    return calls


def _numbers(passes: StepPasses, calls: list[list[_Batch]]) -> dict[str, jax.Array]:
    batches = [batch for call in calls for batch in call]
    count = _total(passes, [mask.sum() * math.prod(x.shape[1:]) for x, mask in batches])
    mean = _total(passes, [jnp.where(mask, x, 0).sum() for x, mask in batches]) / count
    spread = _total(passes, [jnp.where(mask, (x - mean) ** 2, 0).sum() for x, mask in batches])
    alive = [passes.max(functools.reduce(jnp.maximum, map(_alive, call))) for call in calls]
    above = jnp.concatenate([one.reshape(-1) for one in alive])
    return {
        "dead": 1 - above.sum() / above.size,
        "saturated": _saturated(passes, batches) / count,
        "mean": mean,
        "std": jnp.sqrt(spread / count),
    }


def _total(passes: StepPasses, of_batches: list[jax.Array]) -> jax.Array:
    return passes.sum(functools.reduce(jnp.add, [one.astype(jnp.float32) for one in of_batches]))


def _alive(batch: _Batch) -> jax.Array:
    """Returns `int32[units]`, 1 where relu leaves something of a unit for some example."""
    x, mask = batch
    above = (x > 0) & mask
    return above.any(tuple(range(max(x.ndim - 1, 1)))).astype(jnp.int32)


def _saturated(passes: StepPasses, batches: list[_Batch]) -> jax.Array:
    """Returns `float32[]`, how many outputs are near a bound, read as the range of all of them says."""
    high = functools.reduce(jnp.maximum, [jnp.where(mask, x, -jnp.inf).max() for x, mask in batches])
    negated = functools.reduce(jnp.maximum, [jnp.where(mask, -x, -jnp.inf).max() for x, mask in batches])
    high, low = passes.max(high), -passes.max(negated)
    of_sigmoid = (low > 0) & (high <= 1)
    of_tanh = (low >= -1) & (high <= 1)

    def near(x: jax.Array) -> jax.Array:
        bounded = jnp.abs(x) > NEAR
        return jnp.where(
            of_sigmoid,
            bounded | (x < 1 - NEAR),
            jnp.where(of_tanh, bounded, jnp.abs(x) > math.atanh(NEAR)),
        )

    return _total(passes, [(near(x) & mask).sum() for x, mask in batches])
