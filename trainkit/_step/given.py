"""What a step is given beside state and batch: arrays that are never trained, and numbers of the user.

Owns what may be given, where it lies, and how the functions of the user find it while a step is traced. They are
arguments of every compiled program: constants of it would be compiled in, and could not be replaced.
"""

import contextlib
import contextvars
import hashlib
import numbers
from collections.abc import Iterator, Mapping
from typing import Any

import flax.struct
import jax
import numpy as np

from trainkit._core.tree import describe, differences, is_key, named_leaves, signature
from trainkit._core.typing import PyTree
from trainkit.optim._staged import holding_back
from trainkit.parallel._strategy import Strategy


@flax.struct.dataclass
class Given:
    """What the compiled programs take beside state and batch; without leaves where nothing was given.

    Attributes:
        frozen: trees of arrays by name.
        hparams: `float32[]` by name, perhaps nested.
        held_back: static; the groups of parameters that a training step does not move, see `Staged`.
    """

    frozen: Mapping[str, PyTree] = flax.struct.field(default_factory=dict)
    hparams: Mapping[str, Any] = flax.struct.field(default_factory=dict)
    held_back: frozenset[str] = flax.struct.field(pytree_node=False, default=frozenset())


_TRACED: contextvars.ContextVar[tuple[Any, Given] | None] = contextvars.ContextVar("given", default=None)


class Constants:
    """What one trainer gives its steps.

    Args:
        frozen: trees of arrays by name, None for none.
        hparams: values by name, None for none; the numbers among them reach the steps.

    Raises:
        TypeError: `frozen` is no mapping with names as keys, or holds something that no step can take.
    """

    def __init__(self, frozen: Mapping[str, PyTree] | None, hparams: Mapping[str, Any] | None) -> None:
        self._frozen = _owned("frozen", frozen)
        self._hparams = _numbers(hparams or {})
        self._placed: Given | None = None
        self._fingerprint: dict[str, str] | None = None

    def replace(self, frozen: Mapping[str, PyTree]) -> None:
        """Has steps take other arrays from now on.

        Raises:
            TypeError: as at construction.
            ValueError: structure, shapes or dtypes are others than before.
        """
        new = _owned("frozen", frozen)
        found = differences(signature({"frozen": self._frozen}), signature({"frozen": new}))
        if not found and jax.tree.structure(new) != jax.tree.structure(self._frozen):
            found = [
                f"the kinds of its nodes: {jax.tree.structure(self._frozen)} -> {jax.tree.structure(new)}"
            ]
        if found:
            raise ValueError(
                "trainer.frozen was replaced by arrays of another form (before -> now): "
                f"{'; '.join(found[:20])}. Steps are compiled for their structure, shapes and dtypes: keep these, or "
                "make another trainer."
            )
        self._frozen, self._placed, self._fingerprint = new, None, None

    def now(self) -> Given:
        """Returns what the step that is being traced was given; outside of one what the next is going to be."""
        traced = _TRACED.get()
        if traced is not None and traced[0] is self:
            return traced[1]
        return self._placed or Given(self._frozen, self._hparams)

    @contextlib.contextmanager
    def traced(self, given: Given | None) -> Iterator[None]:
        """Has the functions of the user find `given` within."""
        given = given or Given()
        token = _TRACED.set((self, given))
        try:
            with holding_back(given.held_back):
                yield
        finally:
            _TRACED.reset(token)

    def placed(self, strategy: Strategy) -> Given | None:
        """Returns what compiled programs take, on the devices; put there once. None where there is nothing to take."""
        if self._placed is None:
            frozen = strategy.hold(self._frozen) if self._frozen else {}
            hparams = strategy.replicate(self._hparams) if jax.tree.leaves(self._hparams) else self._hparams
            # The arrays of before were copied to be kept; they are not needed twice.
            self._frozen = frozen
            self._placed = Given(frozen, hparams)
        return _or_none(self._placed)

    def spec(self) -> Given | None:
        """Returns the shapes and dtypes of what `placed` returns; starts no device."""
        return _or_none(jax.tree.map(_spec, Given(self._frozen, self._hparams)))

    def fingerprint(self, strategy: Strategy) -> dict[str, str]:
        """Returns dtype, shape and a hash of the values of each frozen array by path; all processes must call."""
        if self._fingerprint is None:
            named = named_leaves(self._frozen)
            raw = [jax.random.key_data(leaf) if is_key(leaf) else leaf for _, leaf in named]
            host = strategy.fetch(raw) if raw else []
            self._fingerprint = {
                name: f"{describe(leaf)} {hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]}"
                for (name, leaf), array in zip(named, host, strict=True)
            }
        return self._fingerprint


def _or_none(given: Given) -> Given | None:
    # Even a tree without leaves costs time at each call, one without nodes does not.
    return given if jax.tree.leaves(given) else None


def check_frozen_same(saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuses frozen arrays that are not those that a run was trained with.

    Args:
        saved: what `Constants.fingerprint` returned then.
        now: what it returns.

    Raises:
        ValueError: names those that differ.
    """
    found = differences(dict(saved), dict(now))
    if found:
        more = f"; and {len(found) - 20} more" if len(found) > 20 else ""
        raise ValueError(
            "Trainer(frozen=) has other arrays than those that the run was trained with (dtype, shape and the "
            f"beginning of the SHA-256 of the values, saved -> now): {'; '.join(found[:20])}{more}. To go on exactly "
            "give the same; to train on with others use trainer.restore(path), then fit without resume=True."
        )


def _owned(argument: str, tree: object) -> dict[str, Any]:
    """Returns a mapping of trees with every array of the host copied: nobody else writes into what is held."""
    if tree is None:
        return {}
    if not isinstance(tree, Mapping):
        raise TypeError(
            f"{argument} is of type {type(tree).__name__}; expected a mapping of names to trees of arrays, e.g. "
            f"{argument}={{'teacher': variables}}."
        )
    unnamed = [name for name in tree if not isinstance(name, str)]
    if unnamed:
        raise TypeError(f"{argument} has the name {unnamed[0]!r}; names are strings.")
    for name, leaf in named_leaves({argument: dict(tree)}):
        if not (_is_number(leaf) or isinstance(leaf, (np.ndarray, jax.Array, bool))) or _odd(leaf):
            raise TypeError(
                f"{name} is {describe(leaf)}; expected arrays and numbers, which steps can take as arguments."
            )
    return jax.tree.map(_copied, dict(tree))


def _odd(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) and (leaf.dtype.kind in "OUSMm" or leaf.dtype.fields is not None)


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        # A weakly typed one would be another program than what replaces it.
        return leaf.astype(leaf.dtype) if leaf.weak_type else leaf
    array = np.asarray(leaf)
    return np.array(array, jax.dtypes.canonicalize_dtype(array.dtype))


def _numbers(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the numbers of a mapping as `float32[]`, in the same nest; all else is for the log only."""
    found: dict[str, Any] = {}
    for name, value in hparams.items():
        if isinstance(value, Mapping):
            found[name] = _numbers(value)
        elif _is_number(value):
            found[name] = np.asarray(float(value), np.float32)
    return found


def _is_number(value: Any) -> bool:
    """Says whether a value is a real number, an array of rank 0 included; True and False are none."""
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return value.ndim == 0 and not is_key(value) and np.dtype(value.dtype).kind in "iuf"
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _spec(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
