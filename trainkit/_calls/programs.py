"""Several training steps in one call: the programs, and what they are given. Owns no choice among them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from trainkit._calls.choice import Choice
from trainkit._core.jaxprs import convolves
from trainkit._core.tree import is_key
from trainkit._core.typing import PyTree
from trainkit._feed.feed import Fed
from trainkit._feed.intake import Block
from trainkit._feed.resident import NOTHING
from trainkit.parallel._strategy import Role, Strategy

Run = Callable[[Any, Any, Any, Sequence[Fed]], tuple[Any, Any]]
"""`run(raw, packed, held, feds) -> (raw, packed)`."""

_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
STACKED_BYTES = 16 * 2**20
"""Most bytes of stacked batches in one call."""


class Make(NamedTuple):
    """What a compiled step is specialised on: structure, shapes, dtypes, and whether all is on the host."""

    structure: Any
    leaves: tuple[tuple[tuple[int, ...], Any], ...]
    on_host: bool

    def fits(self, fed: Fed) -> bool:
        """Says whether `fed` is of this make; what `make_of(fed) == self` says, in less time."""
        leaves, structure = jax.tree.flatten((fed.batch, fed.mask))
        if structure != self.structure:
            return False
        on_host = True
        for leaf, (shape, dtype) in zip(leaves, self.leaves, strict=True):
            host = isinstance(leaf, np.ndarray)
            if not (host or isinstance(leaf, jax.Array)) or leaf.shape != shape or leaf.dtype != dtype:
                return False
            on_host = on_host and host
        return on_host == self.on_host

    @property
    def bytes(self) -> int:
        """The bytes of one batch and its mask."""
        return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in self.leaves)


def make_of(fed: Fed) -> Make | None:
    """Returns the make of a batch, None where steps on such batches are not put into one call."""
    leaves, structure = jax.tree.flatten((fed.batch, fed.mask))
    on_host = True
    for leaf in leaves:
        if isinstance(leaf, np.ndarray):
            continue
        # A Python number is weakly typed, and would no longer be when stacked.
        if not isinstance(leaf, jax.Array):
            return None
        on_host = False
    return Make(structure, tuple([(leaf.shape, leaf.dtype) for leaf in leaves]), on_host)


def form_of(tree: PyTree) -> Any:
    """Returns what two trees have in common that one program takes: structure, shapes and dtypes."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple([(leaf.shape, leaf.dtype) for leaf in leaves])


def spec_of_call(raw: Any, packed: Any, held: Any, example: Fed) -> Any:
    """Returns shapes, dtypes and layouts of what a step is called with."""
    return jax.tree.map(_spec, (raw, packed, held, example.batch, example.mask))


class Programs:
    """The compiled calls for batches of one make.

    Args:
        step: `step(raw, packed, held, batch, mask) -> (raw, packed)`, pure.
        single: `step` compiled by the strategy.
        strategy: compiles the others.
        example: a batch of the make.
        raw: the train state, with its key raw.
        packed: the carried metrics.
        held: what steps are given at each call.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        single: Callable[..., Any],
        strategy: Strategy,
        example: Fed,
        raw: Any,
        packed: Any,
        held: Any = NOTHING,
    ) -> None:
        self._step, self.single, self._strategy = step, single, strategy
        # Shapes and layouts are all that lowering needs: the first call takes the buffers.
        self._example = spec_of_call(raw, packed, held, example)
        device_set = jax.tree.leaves(raw)[0].sharding.device_set
        self._device = next(iter(device_set))
        make = make_of(example)
        # On the host stacking is one copy; what lies on devices is handed over as it is, and stacked there.
        self._stacked = make is not None and make.on_host and strategy.takes_host_batches
        self.bytes = 0 if make is None else make.bytes

    @property
    def platform(self) -> str:
        """Where the steps run, e.g. `cpu`."""
        return self._device.platform

    @property
    def device_kind(self) -> str:
        """The name of the device's model."""
        return self._device.device_kind

    @property
    def can_lower(self) -> bool:
        """Whether the strategy compiles with `jax.jit`, so that what it compiles can be looked into."""
        return isinstance(self.single, jax.stages.Wrapped)

    @functools.cached_property
    def can_repeat(self) -> bool:
        """Whether a step can share a program with those after it: it can be lowered, and its state keeps its form."""
        if not self.can_lower:
            return False
        return form_of(self._traced.out_info) == form_of(self._example[:2])

    @property
    def convolves(self) -> bool:
        """Whether the step has a convolution."""
        return convolves(self._traced.jaxpr.jaxpr)

    @functools.cached_property
    def text(self) -> str:
        """The single step as StableHLO."""
        return self._traced.lower().as_text()

    @property
    def any_size(self) -> bool:
        """Whether a scanned call may be shorter than its size."""
        # Elsewhere the host would decide after each round of the loop whether there is another.
        return self.platform == "cpu"

    def lower(self, choice: Choice) -> jax.stages.Lowered:
        """Returns the program of `choice`, traced and not yet compiled."""
        if choice.kind == "single":
            return self._traced.lower()
        raw, packed, held, batch, mask = self._example
        given = jax.tree.map(lambda leaf: _stacked_spec(leaf, choice.size), (batch, mask))
        if not self._stacked:
            given = tuple((one,) * choice.size for one in (batch, mask))
        fused = functools.partial(self._fused, choice)
        compiled: Any = self._strategy.compile(
            fused,
            inputs=(Role.STATE, Role.WHOLE, Role.WHOLE, Role.WHOLE, Role.ROWS, Role.ROWS),
            outputs=(Role.STATE, Role.WHOLE),
            donate=(0,),
        )
        return compiled.lower(raw, packed, held, np.int32(choice.size), *given)

    def compile(self, choice: Choice, lowered: jax.stages.Lowered | None = None) -> Run:
        """Returns the compiled program of `choice`; may run in a thread when it is given `lowered`."""
        lowered = self.lower(choice) if lowered is None else lowered
        on_cpu = choice.scheduler == "memory" and self.platform == "cpu"
        compiled = lowered.compile(compiler_options=dict(_MEMORY) if on_cpu else None)
        if choice.kind == "single":
            return lambda raw, packed, held, feds: compiled(raw, packed, held, feds[0].batch, feds[0].mask)

        def run(raw: Any, packed: Any, held: Any, feds: Sequence[Fed]) -> Any:
            pack = _stacked if self._stacked else _listed
            return compiled(raw, packed, held, np.int32(len(feds)), *pack(feds, choice.size))

        return run

    @functools.cached_property
    def _traced(self) -> jax.stages.Traced:
        single: Any = self.single
        return single.trace(*self._example)

    def _fused(
        self, choice: Choice, raw: Any, packed: Any, held: Any, count: Any, batches: Any, masks: Any
    ) -> Any:
        if not self._stacked:
            batches, masks = (
                jax.tree.map(lambda *one: jax.numpy.stack(one), *all) for all in (batches, masks)
            )
        # Traced once, however often it is called.
        step = jax.jit(self._step)

        def at(index: Any, carry: Any) -> Any:
            pick = functools.partial(jax.lax.dynamic_index_in_dim, index=index, keepdims=False)
            return step(*carry, held, *jax.tree.map(pick, (batches, masks)))

        if choice.kind == "unrolled":
            return functools.reduce(lambda carry, index: at(index, carry), range(choice.size), (raw, packed))
        return jax.lax.fori_loop(0, count if self.any_size else choice.size, at, (raw, packed))


def _spec(leaf: Any) -> Any:
    # An array that is free to move must stay so: else the step alone, given what this returned, compiles again.
    sharding = leaf.sharding if isinstance(leaf, jax.Array) and leaf.committed else None
    dtype = leaf.dtype if is_key(leaf) else jax.dtypes.canonicalize_dtype(leaf.dtype)
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)


def _stacked_spec(leaf: Any, size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype)


def _stacked(feds: Sequence[Fed], size: int) -> PyTree:
    if isinstance(feds, Block):
        return feds.stacked(size)

    def stack(*leaves: np.ndarray) -> np.ndarray:
        # What a shorter call leaves free is never read.
        out = np.empty((size, *leaves[0].shape), leaves[0].dtype)
        if leaves[0].ndim:
            rows = len(leaves[0])
            np.concatenate(leaves, out=out.reshape(-1, *leaves[0].shape[1:])[: rows * len(leaves)])
        else:
            out[: len(leaves)] = leaves
        return out

    return jax.tree.map(stack, *[(fed.batch, fed.mask) for fed in feds])


def _listed(feds: Sequence[Fed], size: int) -> PyTree:
    feds = [*feds, *[feds[-1]] * (size - len(feds))]
    return tuple(fed.batch for fed in feds), tuple(fed.mask for fed in feds)
