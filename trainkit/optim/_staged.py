"""`Staged`: an optimizer whose parameters join in groups, each with a state of its own from the moment it does.

Owns the states of the groups and one update of those that are trained; not when a group is released.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainkit._core.patterns import Patterns, is_box
from trainkit._core.tree import describe, path_name
from trainkit._core.typing import PyTree

_HELD_BACK: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar("held_back", default=frozenset())


@contextlib.contextmanager
def holding_back(groups: frozenset[str]) -> Iterator[None]:
    """Has updates within leave these groups as they are. Static: it is part of what is compiled."""
    token = _HELD_BACK.set(groups)
    try:
        yield
    finally:
        _HELD_BACK.reset(token)


class StagedState(NamedTuple):
    """State of `Staged`.

    Attributes:
        groups: the state of the inner transformation by group, for the parameters of that group alone.
    """

    groups: dict[str, PyTree]


class Staged(optax.GradientTransformationExtraArgs):
    """A transformation that moves the groups that are released, see `holding_back`.

    Each group has a state of its own, made at the start, which stays so until the group is released: counts and
    schedules begin there. An update runs the inner transformation once for each released group, on the gradients of
    all of them, so that clipping by a global norm sees these; what it gives for the other groups is dropped, and
    never computed by XLA.

    Attributes:
        init: as of any transformation.
        update: as of any transformation; where a group is not released its updates are 0 and its state stays.
        patterns: of the groups, in their order.
        rest: label of the parameters without a pattern.
    """

    patterns: Patterns
    rest: str

    def label(self, name: str) -> str:
        """Returns the group of the parameter at a path."""
        index = self.patterns.first(name)
        return self.rest if index is None else self.patterns.patterns[index]

    def moving(self, params: PyTree) -> list[bool]:
        """Returns for each leaf of the parameters whether the updates of this moment move it."""
        held_back, (nodes, labels, _) = _HELD_BACK.get(), _labelled(self, params)
        pairs = zip(nodes, labels, strict=True)
        return [label not in held_back for node, label in pairs for _ in jax.tree.leaves(node)]


def staged(tx: optax.GradientTransformation, patterns: Patterns) -> Staged:
    """Returns `tx` for groups that join one after the other.

    Args:
        tx: any transformation that can be masked, as `optax.masked` does it.
        patterns: of the groups; parameters without one are trained from the start.
    """
    inner = optax.with_extra_args_support(tx)

    def init(params: PyTree) -> StagedState:
        nodes, labels, structure = _labelled(made, params)
        names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box)]
        patterns.check_used(names)
        jax.eval_shape(
            inner.init, params
        )  # for what it refuses of all parameters, before it sees them in parts
        order = [label for label in (*patterns.patterns, made.rest) if label in labels]
        return StagedState(
            {one: inner.init(_masked(nodes, labels, structure, frozenset({one}))) for one in order}
        )

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        if not isinstance(state, StagedState):
            raise ValueError(
                "tk.callbacks.Finetune keeps the optimizer state by groups, and this state has another. Start from "
                "trainer.init(batch), and put in what you have: trainer.state = trainer.state.replace(params=...)."
            )
        grads, labels, structure = _labelled(made, updates)
        now = frozenset(state.groups) - _HELD_BACK.get()
        seen = _masked(grads, labels, structure, now)
        given = None if params is None else _masked(structure.flatten_up_to(params), labels, structure, now)
        parts = {label: group for label, group in state.groups.items() if label in now}
        moved, groups = [jax.tree.map(jnp.zeros_like, grad) for grad in grads], dict(state.groups)
        for one in parts:
            with _explained():
                view = _view(inner.init, seen if given is None else given, parts, one)
                found, after = inner.update(seen, view, given, **extra)
                groups[one] = _own(after, state.groups[one])
            found = structure.flatten_up_to(found)
            moved = [
                new if label == one else old for new, old, label in zip(found, moved, labels, strict=True)
            ]
        return structure.unflatten(moved), StagedState(groups)

    made = Staged(init, update)
    made.patterns = patterns
    made.rest = "rest" if "rest" not in patterns.patterns else "the rest"
    return made


def _labelled(tx: Staged, tree: PyTree) -> tuple[list[Any], list[str], Any]:
    """Returns the parameters of a tree, the group of each, and the structure that holds them."""
    found, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_box)
    return [node for _, node in found], [tx.label(path_name(path)) for path, _ in found], structure


def _masked(nodes: list[Any], labels: list[str], structure: Any, kept: frozenset[str]) -> PyTree:
    return structure.unflatten(
        [node if label in kept else optax.MaskedNode() for node, label in zip(nodes, labels, strict=True)]
    )


def _view(init: Callable[[PyTree], PyTree], params: PyTree, parts: Mapping[str, PyTree], one: str) -> PyTree:
    """Returns the state of all parts together: what belongs to parameters from each, all else from that of `one`.

    What belongs to a parameter is known by being in the state of its group alone.
    """
    if len(parts) == 1:
        return parts[one]
    wanted, structure = jax.tree_util.tree_flatten_with_path(jax.eval_shape(init, params))
    there = {label: dict(jax.tree_util.tree_leaves_with_path(part)) for label, part in parts.items()}
    leaves = []
    for path, like in wanted:
        source = next((label for label in (one, *there) if path in there[label]), None)
        found = None if source is None else there[source][path]
        if found is None or describe(found) != describe(like):
            was = "absent" if found is None else describe(found)
            raise _Inseparable(
                f"{path_name(path)} is {describe(like)} for all that is trained and {was} for one group"
            )
        leaves.append(found)
    return structure.unflatten(leaves)


def _own(after: PyTree, before: PyTree) -> PyTree:
    """Returns of a state after an update what the state of one group holds."""
    found = dict(jax.tree_util.tree_leaves_with_path(after))
    wanted, structure = jax.tree_util.tree_flatten_with_path(before)
    for path, like in wanted:
        if path not in found or describe(found[path]) != describe(like):
            raise _Inseparable(f"{path_name(path)} is another after an update of several groups")
    return structure.unflatten([found[path] for path, _ in wanted])


class _Inseparable(ValueError):
    pass


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except _Inseparable as error:
        raise ValueError(
            "tk.callbacks.Finetune trains groups of parameters, each with a part of the optimizer state, and the state "
            f"of this optimizer has no such parts: {error}. Use one that treats each parameter by itself, as those of "
            "optax do but for optax.flatten."
        ) from error
