"""`by_path`: an optimizer for each group of parameters, told apart by their paths. Owns no arithmetic."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from trainkit._core.patterns import Patterns, is_box, listed, paths_of
from trainkit._core.tree import path_name
from trainkit._core.typing import PyTree


class ByPath(optax.GradientTransformationExtraArgs):
    """What `by_path` returns: an optax transformation that can tell the group of a parameter.

    Attributes:
        init: as of any transformation.
        update: as of any transformation.
        patterns: of the groups, in their order.
    """

    patterns: Patterns

    def group_of(self, name: str) -> str | None:
        """Returns the pattern of the group of the parameter at a path, None where there is none."""
        index = self.patterns.first(name)
        return None if index is None else self.patterns.patterns[index]


def by_path(groups: Mapping[str, optax.GradientTransformation]) -> ByPath:
    """Returns an optimizer that updates each group of parameters by a transformation of its own.

    It is `optax.partition` with labels read off the paths, so each group has a state, a count and schedules of its
    own, and clipping within a group sees that group. Put what is to see all parameters around it, with `optax.chain`.

    Args:
        groups: transformations by pattern: a regular expression, searched (`re.search`) in the path of a parameter,
            e.g. `encoder/Dense_0/kernel`. The first that is found counts; `".*"` as the last takes what is left.

    Raises:
        TypeError: `groups` is no mapping of strings to transformations.
        ValueError: there is none, or a pattern is no regular expression; and at the initialisation of the state, where
            a pattern is found in no path, or a parameter has no pattern; lists some paths.

    Example:
        >>> tx = by_path({"encoder": optax.sgd(1e-4), ".*": optax.adam(1e-3)})
        >>> state = tx.init({"encoder": {"kernel": jax.numpy.ones(2)}, "head": {"bias": jax.numpy.ones(3)}})
    """
    if not isinstance(groups, Mapping):
        raise TypeError(
            f"by_path takes a mapping of patterns to transformations, got {type(groups).__name__}; e.g. "
            "by_path({'encoder': optax.sgd(1e-4), '.*': optax.adam(1e-3)})."
        )
    if not groups:
        raise ValueError("by_path({}) has no group; give one at least, e.g. {'.*': optax.adam(1e-3)}.")
    for pattern, tx in groups.items():
        if not (hasattr(tx, "init") and hasattr(tx, "update")):
            raise TypeError(
                f"by_path: the group {pattern!r} is {tx!r}; expected an optax transformation, e.g. optax.adam(1e-3)."
            )
    patterns = Patterns("by_path", groups)

    def labels_of(tree: PyTree) -> PyTree:
        def label(path: tuple[Any, ...], _: Any) -> str:
            index = patterns.first(path_name(path))
            if index is None:
                names = [name for _, name in paths_of(tree) if patterns.first(name) is None]
                raise ValueError(
                    f"by_path: no pattern is found in the paths {listed(names)}. Every parameter needs one of "
                    f"{', '.join(map(repr, patterns.patterns))}; close the mapping with '.*' for what is left: "
                    "optax.set_to_zero() leaves it as it is."
                )
            return patterns.patterns[index]

        return jax.tree_util.tree_map_with_path(label, tree, is_leaf=is_box)

    transforms: Any = dict(groups)
    inner = optax.partition(transforms, labels_of)

    def init(params: PyTree) -> Any:
        # A tree without leaves is a placeholder, with which optax looks for what in a state belongs to parameters; of
        # one that is masked this is a part.
        names = [name for _, name in paths_of(params)]
        if names and not _is_masked(params):
            patterns.check_used(names)
        return inner.init(params)

    made = ByPath(init, inner.update)
    made.patterns = patterns
    return made


def _is_masked(tree: PyTree) -> bool:
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    return any(isinstance(node, optax.MaskedNode) for node in nodes)
