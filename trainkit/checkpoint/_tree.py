"""Arrays by path name, and the nested dicts that Orbax stores. Owns the translation."""

from collections.abc import Mapping
from typing import Any


def nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `{"params/Dense_0/kernel": a}` as `{"params": {"Dense_0": {"kernel": a}}}`.

    Raises:
        ValueError: a name is both that of an array and of a branch.
    """
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *branches, last = name.split("/")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
            if not isinstance(node, dict):
                raise ValueError(f"{name}: {branch} is an array and a branch; rename one.")
        if last in node:
            raise ValueError(f"{name} is an array and a branch; rename one.")
        node[last] = array
    return tree


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Undoes `nested`."""
    arrays = {}
    for key, value in tree.items():
        arrays |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return arrays
