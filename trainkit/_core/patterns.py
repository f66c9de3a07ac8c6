"""Patterns of paths: the one rule by which parameters are told apart by name. Owns no meaning of a match.

Patterns are regular expressions, searched in paths such as `encoder/Dense_0/kernel`; the first that is found counts,
and one that is found in no path is a slip.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax

from trainkit._core.tree import path_name
from trainkit._core.typing import PyTree

_LISTED = 12


class Patterns:
    """Regular expressions in their order.

    Args:
        owner: who has them, as errors call it, e.g. `by_path`.
        patterns: searched in paths.

    Raises:
        TypeError: one is no string.
        ValueError: one is no regular expression.
    """

    def __init__(self, owner: str, patterns: Iterable[str]) -> None:
        self._owner, self.patterns = owner, tuple(patterns)
        self._compiled = [_compiled(owner, pattern) for pattern in self.patterns]

    def found(self, index: int, name: str) -> bool:
        """Says whether the pattern of that number is found in a path."""
        return self._compiled[index].search(name) is not None

    def first(self, name: str) -> int | None:
        """Returns the number of the first pattern that is found in a path, None where none is."""
        return next((index for index in range(len(self.patterns)) if self.found(index, name)), None)

    def check_used(self, names: Sequence[str]) -> None:
        """Refuses patterns that are found in none of these paths.

        Raises:
            ValueError: names them, and some of the paths.
        """
        idle = [
            pattern
            for index, pattern in enumerate(self.patterns)
            if not any(self.found(index, name) for name in names)
        ]
        if idle:
            raise ValueError(
                f"{self._owner}: no parameter has a path in which {', '.join(map(repr, idle))} is found. Patterns are "
                f"regular expressions, searched in paths; those of this model are {listed(names)}."
            )


def listed(names: Sequence[str]) -> str:
    """Returns the first of some names, and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{', '.join(names[:_LISTED])}{more}"


def is_box(node: Any) -> bool:
    """Says whether a node is a parameter with metadata, such as `nn.Partitioned`, whose path is that of the box."""
    return isinstance(node, nn.meta.AxisMetadata)


def paths_of(params: PyTree) -> list[tuple[tuple[Any, ...], str]]:
    """Returns the path of each parameter, as keys and as people write it."""
    found = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box)
    return [(path, path_name(path)) for path, _ in found]


def _compiled(owner: str, pattern: object) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise TypeError(f"{owner}: {pattern!r} is no pattern; expected a string, e.g. 'encoder'.")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{owner}: {pattern!r} is no regular expression: {error}.") from error
