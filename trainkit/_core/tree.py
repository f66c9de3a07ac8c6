"""Paths and small operations on pytrees. Knows nothing of training."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from trainkit._core.typing import PyTree


def path_name(path: tuple[Any, ...]) -> str:
    """Returns a key path as people write it, e.g. `params/Dense_0/kernel`; the root is `(root)`."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "(root)"


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """Returns the leaves of `tree` with their path names, in tree order."""
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def describe(leaf: Any) -> str:
    """Returns a leaf's dtype and shape, e.g. `float32[64, 10]`, or its type where it has none."""
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return f"{leaf.dtype}[{', '.join(map(str, leaf.shape))}]"
    return type(leaf).__name__


def signature(tree: PyTree) -> dict[str, str]:
    """Returns the dtype and shape of each leaf by path name."""
    return {name: describe(leaf) for name, leaf in named_leaves(tree)}


def differences(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """Returns one line per leaf that `new` has otherwise than `old`, both made by `signature`."""
    lines = [f"{name}: {old[name]} -> {new[name]}" for name in old if name in new and old[name] != new[name]]
    lines += [f"{name}: {old[name]} -> absent" for name in old if name not in new]
    lines += [f"{name}: absent -> {new[name]}" for name in new if name not in old]
    return lines


def copy_arrays(tree: PyTree) -> PyTree:
    """Returns `tree` with every array in a buffer of its own, so that donating one leaves the other whole."""
    if not any(map(_is_spread, jax.tree.leaves(tree))):
        return jax.device_put(tree, may_alias=False)
    # What is spread over several processes device_put does not copy.
    return jax.tree.map(
        lambda leaf: copy_array(leaf) if _is_spread(leaf) else jax.device_put(leaf, may_alias=False), tree
    )


def _is_spread(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


copy_array = jax.jit(jnp.copy)
"""Returns an array in a buffer of its own; in a tenth of the time that `jnp.copy` takes to be called."""


def begin_fetch(tree: PyTree) -> None:
    """Starts the copies of arrays to the host, so that reading them later need not wait; on a CPU there are none."""
    if jax.default_backend() != "cpu":
        for leaf in jax.tree.leaves(tree):
            leaf.copy_to_host_async()


def select(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """Returns `new` where the `bool[]` holds, else `old`, of the same structure and dtypes."""

    def pick(one: Any, other: Any) -> Any:
        # A layer may give a statistic its final shape at the first update, e.g. [n] -> [1, n].
        return jnp.where(condition, one, jnp.broadcast_to(other, jnp.shape(one)))

    return jax.tree.map(pick, new, old)


def is_key(leaf: Any) -> bool:
    """Says whether `leaf` is an array of typed PRNG keys."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def key_generator(dtype: Any) -> str:
    """Returns the name under which `jax.random` knows the generator of a key dtype such as `key<fry>`."""
    return {"fry": "threefry2x32", "rbg": "rbg", "urbg": "unsafe_rbg"}[str(dtype)[4:-1]]


def nested(arrays: Mapping[str, Any], keys: Mapping[str, list[str | int]] | None = None) -> dict[str, Any]:
    """Returns `{"params/Dense_0/kernel": a}` as `{"params": {"Dense_0": {"kernel": a}}}`.

    Args:
        arrays: by path name.
        keys: those of names that are not to be split at each `/`, see `odd_keys`.

    Raises:
        ValueError: a name is both that of an array and of a branch.
    """
    tree: dict[Any, Any] = {}
    for name, array in arrays.items():
        *branches, last = (keys or {}).get(name) or name.split("/")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
            if not isinstance(node, dict):
                raise ValueError(f"{name}: {branch} is an array and a branch; rename one.")
        if last in node:
            raise ValueError(f"{name} is an array and a branch; rename one.")
        node[last] = array
    return tree


def dict_keys(path: tuple[Any, ...]) -> list[str | int] | None:
    """Returns the keys of a path through dicts, None where there is anything else or a key is neither str nor int."""
    keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    plain = len(keys) == len(path) and all(type(key) in (str, int) for key in keys)
    return keys if plain else None


def odd_keys(tree: PyTree) -> dict[str, list[str | int]]:
    """Returns the keys of each leaf in dicts whose path name does not tell them: those with a `/`, and ints."""
    found = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(tree):
        keys = dict_keys(path)
        if keys and keys != path_name(path).split("/"):
            found[path_name(path)] = keys
    return found


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Undoes `nested`."""
    arrays = {}
    for key, value in tree.items():
        arrays |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return arrays
