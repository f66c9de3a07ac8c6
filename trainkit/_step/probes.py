"""The training step with probes, and what these are told of the passes behind it: rows, gradients, activations.

Owns the answers; the step and its passes are those of `Steps`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from trainkit._core.state import TrainState, with_raw_key, with_typed_key
from trainkit._core.typing import Batch, PyTree
from trainkit._step.given import Given
from trainkit._step.parts import Updated
from trainkit._step.steps import Steps
from trainkit.hooks._passes import Captured, Piece, StepPasses
from trainkit.hooks._probe import StepProbe, run_probes
from trainkit.metrics._accumulator import Accumulator


class ProbedSteps:
    """The training step that also tells what probes ask.

    Args:
        steps: of the trainer.
        probes: of its callbacks.
    """

    def __init__(self, steps: Steps, probes: tuple[StepProbe, ...]) -> None:
        self._steps, self._probes = steps, probes

    def __bool__(self) -> bool:
        return bool(self._probes)

    def train(
        self,
        accumulator: Accumulator,
        impl: str,
        given: Given | None,
        state: TrainState,
        packed: Any,
        batch: Batch,
        mask: Any,
    ) -> tuple[TrainState, Any, dict[str, Any]]:
        """As `Steps.train`, with the values of all probes by name beside what that returns."""
        steps = self._steps
        steps.traces.record("probed training", {"state": state, "batch": batch, "mask": mask})
        before = with_typed_key(state, impl)
        new_state, merged, done = steps.advance(accumulator, given, before, packed, batch, mask)
        with steps.constants.traced(given):
            values = self._values(before, batch, mask, new_state, done)
        return with_raw_key(new_state), merged, values

    def look(self, given: Given | None, state: TrainState, batch: Batch) -> dict[str, Any]:
        """Returns what the probes say of an update by one batch without padding, before hooks; for its shapes alone."""
        done = self._steps.attempt_one(given, state, batch)
        parts = (batch, None) if self._steps.accumulate == 1 else ((batch,), (None,))
        with self._steps.constants.traced(given):
            return self._values(state, *parts, done.state, done)

    def _values(
        self, before: TrainState, batch: Batch, mask: Any, new_state: TrainState, done: Updated
    ) -> dict[str, Any]:
        passes = Passes(self._steps, before, batch, mask, done)
        return run_probes(self._probes, done.told(before)._replace(state=new_state, passes=passes))


class Passes(StepPasses):
    """Answers for one step.

    Args:
        steps: that it is one of.
        before: the state before the step.
        batch: as `Steps.train` takes it.
        mask: as `Steps.train` takes it.
        done: its update.
    """

    def __init__(self, steps: Steps, before: TrainState, batch: Batch, mask: Any, done: Updated) -> None:
        self._steps, self._before, self._done = steps, before, done
        self._parts = steps.parts(batch, mask)

    @property
    def batch(self) -> Any:
        batches = tuple(self._gathered(batch) for batch, _ in self._parts)
        return batches[0] if self._steps.accumulate == 1 else batches

    @property
    def mask(self) -> Any:
        masks = tuple(self._gathered(self._steps.forward.real(*part)) for part in self._parts)
        return masks[0] if self._steps.accumulate == 1 else masks

    def pieces(self, asker: str) -> list[Piece]:
        if self._steps.has_own_train:
            raise ValueError(
                f"{asker} needs the gradients of the step, and this trainer has its own train_step, which tells none. "
                "Leave the callback out, or compute what you want there and return it among the outputs."
            )
        return self._halves(asker) if self._steps.accumulate == 1 else self._batches()

    def captured(self, asker: str) -> list[Captured]:
        if self._steps.has_own_train:
            raise ValueError(
                f"{asker} runs the forward pass of `loss` once more, and this trainer has its own train_step, of which "
                "that may be no part. Leave the callback out, or return what you want among the outputs."
            )
        before, forward = self._before, self._steps.forward
        return [
            Captured(
                _by_path(
                    forward.captured(
                        before.variables, batch, mask, before.step, self._steps.part_key(before, index)
                    )
                ),
                forward.real(batch, mask),
            )
            for index, (batch, mask) in enumerate(self._parts)
        ]

    def sum(self, tree: PyTree) -> PyTree:
        return self._steps.strategy.sum(tree)

    def max(self, tree: PyTree) -> PyTree:
        return self._steps.strategy.max(tree)

    def _batches(self) -> list[Piece]:
        """Returns the micro-batches of the step, whose gradients it computed anyway."""
        counts = [self._count(self._steps.forward.real(*part)) for part in self._parts]
        if self._done.weight is None:
            weights, total = counts, sum(counts, start=jnp.float32(0))
        else:
            weights, total = [self.sum(share.weight) for share in self._done.shares], self._done.weight
        pieces = []
        for count, weight, share in zip(counts, weights, self._done.shares, strict=True):
            grads = self._steps.unscaled(self._before, self.sum(share.grads))
            pieces.append(Piece(count, _times(grads, total / _not_zero(weight))))
        return pieces

    def _halves(self, asker: str) -> list[Piece]:
        """Returns the halves of the batch: one by a pass of its own, the other is what is left of the gradient."""
        ((batch, mask),) = self._parts
        if not self._done.per_example or self._steps.forward.rows(batch) is None:
            raise ValueError(
                f"{asker} compares gradients of two batch sizes, and this loss is a scalar for the whole batch, or the "
                "batch one unit, which can't be divided. Return one loss per example, shape [batch], or use "
                "Trainer(accumulate=2) or more."
            )
        real = self._steps.forward.real(batch, mask)
        count = self.sum(real.sum())
        first = real & (self._places(real) <= count - count // 2)
        weight, grads = self._steps.gradient(self._before, ((batch, first),))
        own, all_ = self._count(first), self._count(real)
        total = all_ if self._done.weight is None else self._done.weight
        part = own if weight is None else weight
        rest = jax.tree.map(
            lambda whole, half: (whole * total - half * part) / _not_zero(total - part),
            self._done.grads,
            grads,
        )
        return [Piece(own, grads), Piece(all_ - own, rest)]

    def _places(self, real: jax.Array) -> jax.Array:
        """Returns `int32[rows]`, how many rows of all replicas are real up to each of this one's."""
        axis = self._steps.strategy.replica_axis
        if axis is None:
            return jnp.cumsum(real)
        counts = jax.lax.all_gather(real.sum(), axis)
        before = jnp.where(jnp.arange(len(counts)) < jax.lax.axis_index(axis), counts, 0).sum()
        return before + jnp.cumsum(real)

    def _count(self, mask: jax.Array) -> jax.Array:
        return self.sum(mask.sum().astype(jnp.float32))

    def _gathered(self, tree: PyTree) -> PyTree:
        axis = self._steps.strategy.replica_axis
        if axis is None:
            return tree
        return jax.tree.map(
            lambda leaf: jax.lax.all_gather(leaf, axis, tiled=True) if jnp.ndim(leaf) else leaf, tree
        )


def _times(tree: PyTree, factor: jax.Array) -> PyTree:
    return jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), tree)


def _not_zero(total: jax.Array) -> jax.Array:
    return jnp.where(total != 0, total, 1)


def _by_path(node: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[str, list[jax.Array]]:
    """Returns the outputs in Flax's collection of intermediates by the path of the module that returned them."""
    found: dict[str, list[jax.Array]] = {}
    for name, value in node.items():
        if isinstance(value, Mapping):
            found |= _by_path(value, (*path, name))
        elif name == "__call__":
            found["/".join(path)] = [leaf for leaf in jax.tree.leaves(value) if hasattr(leaf, "dtype")]
    return found
