"""Finds and replaces hyperparameters that `optax.inject_hyperparams` keeps in an optimizer state.

They are found however deep they lie: in chains, partitions, masks, `MultiSteps` and in one another. Owns
no decision about their values.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from trainkit._core.tree import describe, path_name
from trainkit._core.typing import PyTree

_INJECTED = (optax.InjectStatefulHyperparamsState, optax.InjectHyperparamsState)
_CURE = "Make the optimizer with them, e.g. optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)"

_Path = tuple[Any, ...]


def values_of(opt_state: PyTree, name: str) -> list[Any]:
    """Returns the values of the hyperparameter `name`, in tree order."""
    nodes: list[Any] = []

    def visit(tree: PyTree) -> None:
        for node in jax.tree.leaves(tree, is_leaf=_is_injected):
            if _is_injected(node):
                nodes.append(node)
                visit(node.inner_state)

    visit(opt_state)
    return [node.hyperparams[name] for node in nodes if name in node.hyperparams]


def labels_of(opt_state: PyTree, name: str) -> list[str]:
    """Returns what to call each of `values_of(opt_state, name)`: "" if it is the only one.

    Several are told apart by the keys of dicts on their paths, such as the labels of `optax.partition`, else
    by the whole path.
    """
    paths = [path for path, node in _find(opt_state) if name in node.hyperparams]
    if len(paths) < 2:
        return [""] * len(paths)
    short = ["/".join(_labels(path)) for path in paths]
    distinct = len(set(short)) == len(short) and all(short)
    return short if distinct else [path_name(path) for path in paths]


def numbers_of(opt_state: PyTree) -> dict[str, Any]:
    """Returns the hyperparameters that are single numbers, by name, or `name/<label>` of several.

    Those that a schedule computes are left out: what they are at one step says little.
    """
    found: dict[str, Any] = {}
    nodes = [node for _, node in _find(opt_state)]
    for name in dict.fromkeys(name for node in nodes for name in node.hyperparams):
        having = [node for node in nodes if name in node.hyperparams]
        for label, node in zip(labels_of(opt_state, name), having, strict=True):
            value = node.hyperparams[name]
            if name not in getattr(node, "hyperparams_states", {}) and jnp.ndim(value) == 0:
                found[f"{name}/{label}" if label else name] = as_shown(np.asarray(value))
    return found


def as_shown(array: np.ndarray) -> Any:
    """Returns an array of one element as Python's number, a float with no more digits than its dtype has."""
    item = array.reshape(()).item()
    return float(str(array.reshape(())[()])) if isinstance(item, float) else item


def check_changeable(owner: str, opt_state: PyTree, name: str, group: str | None = None) -> None:
    """Refuses an optimizer state in which changing the hyperparameter `name` has no lasting effect.

    Args:
        owner: who changes it.
        opt_state: of the optimizer.
        name: of the hyperparameter.
        group: label of `optax.partition` or pattern of `by_path`; None for all.

    Raises:
        ValueError: there is no such hyperparameter or no such group, a schedule computes it, or it is not a float.
    """
    found = [(path, node) for path, node in _find(opt_state) if name in node.hyperparams]
    if not found:
        raise ValueError(f"{owner} changes {name!r} in the optimizer state, {_missing(opt_state)}.")
    groups = sorted({key for path, _ in found for key in _labels(path)})
    found = [(path, node) for path, node in found if _is_in(group, path)]
    if not found:
        known = (
            f"the groups that have it are {', '.join(map(repr, groups))}" if groups else "it has no groups"
        )
        raise ValueError(
            f"{owner} changes {name!r} in the group {group!r} of the optimizer, which is not there: {known}. Groups "
            "are the patterns of tk.optim.by_path, or the labels of optax.partition."
        )
    for path, node in found:
        if name in getattr(node, "hyperparams_states", {}):
            raise ValueError(
                f"{owner} changes {name!r}, but a schedule computes it anew at every update (in opt_state at "
                f"{path_name(path)}), so that a change would not last. Give inject_hyperparams a number "
                f"instead of the schedule, or leave out {owner}."
            )
        if not jnp.issubdtype(jnp.result_type(node.hyperparams[name]), jnp.floating):
            raise ValueError(
                f"{owner} changes {name!r}, which is {describe(node.hyperparams[name])}; give "
                "inject_hyperparams a float."
            )


def missing(owner: str, opt_state: PyTree, name: str) -> str:
    """Returns what to say when `owner` finds no hyperparameter `name`."""
    return f"{owner} reads {name!r} from the optimizer state, {_missing(opt_state)}"


def change(opt_state: PyTree, name: str, fn: Callable[[Any], Any], group: str | None = None) -> PyTree:
    """Returns `opt_state` with `fn` applied to every hyperparameter `name`, or to those in one group."""

    def visit(path: _Path, node: Any) -> Any:
        if not _is_injected(node):
            return node
        # What lies within a node of the group belongs to it too.
        inside = None if _is_in(group, path) else group
        takes = name if inside is None else None
        new = {key: fn(value) if key == takes else value for key, value in node.hyperparams.items()}
        return node._replace(hyperparams=new, inner_state=change(node.inner_state, name, fn, inside))

    return jax.tree_util.tree_map_with_path(visit, opt_state, is_leaf=_is_injected)


def scale(value: jax.Array, factor: float, *, least: float) -> jax.Array:
    """Returns `value * factor`, but neither below `least` nor above `value`; laid out as `value` is.

    Args:
        value: floats of any shape.
        factor: multiplies.
        least: bound from below.

    Returns:
        The same shape, dtype, weak type, sharding and commitment, so that a compiled step takes it too.
    """
    value = jnp.asarray(value)
    return _laid_out_as(value, jnp.minimum(value, jnp.maximum(value * factor, least)))


def constant(value: jax.Array, number: float) -> jax.Array:
    """Returns an array as `value` whose elements are `number`, as `scale` does."""
    value = jnp.asarray(value)
    return _laid_out_as(value, jnp.full_like(value, number))


def _laid_out_as(value: jax.Array, new: jax.Array) -> jax.Array:
    # Committing an array that was not, or laying it out anew, would compile the step again.
    return jax.device_put(new, value.sharding) if value.committed and new.sharding != value.sharding else new


def _labels(path: _Path) -> list[str]:
    return [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]


def _is_in(group: str | None, path: _Path) -> bool:
    return group is None or group in _labels(path)


def _is_injected(node: Any) -> bool:
    return isinstance(node, _INJECTED)


def _find(opt_state: PyTree) -> list[tuple[_Path, Any]]:
    """Returns every injected state with its path, in tree order, outer before inner."""
    found: list[tuple[_Path, Any]] = []
    for path, node in jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=_is_injected):
        if _is_injected(node):
            inside = (*path, jax.tree_util.GetAttrKey("inner_state"))
            found.append((path, node))
            found += [((*inside, *inner), deeper) for inner, deeper in _find(node.inner_state)]
    return found


def _missing(opt_state: PyTree) -> str:
    names = sorted({name for _, node in _find(opt_state) for name in node.hyperparams})
    if names:
        return f"which has injected hyperparameters of other names only: {', '.join(names)}"
    return f"which has no injected hyperparameters. {_CURE}"
