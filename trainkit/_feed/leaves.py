"""What of a batch a step can take, and what stays on the host. Owns the parting and the warnings; places nothing."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from trainkit._core.tree import named_leaves
from trainkit._core.typing import Batch
from trainkit.data._batch import is_numeric, stays_on_host

_LOG = logging.getLogger("trainkit")
_OUT = object()


class Warned:
    """What was said once already, of the batches of one trainer.

    Attributes:
        names: of the leaves of which something was said.
        on_host: of those that stay on the host.
    """

    def __init__(self) -> None:
        self.names, self.on_host = set[str](), set[str]()

    def host(self, name: str, leaf: Any) -> None:
        """Says that a leaf stays on the host."""
        self.on_host.add(name)
        if name not in self.names:
            self.names.add(name)
            _LOG.warning(
                "the leaf `%s` of a batch (%s) is nothing that a step can take: it stays on the host, is left out of "
                "what `loss` is given, and comes back beside the outputs of `predict` and in what metrics collect.",
                name,
                leaf.dtype,
            )

    def check_wide(self, name: str, leaf: np.ndarray) -> None:
        """Says that a leaf holds integers which 32 bits do not."""
        if not leaf.size or name in self.names:
            return
        narrow = np.iinfo(np.int32 if leaf.dtype.kind == "i" else np.uint32)
        if leaf.max() > narrow.max or leaf.min() < narrow.min:
            self.names.add(name)
            _LOG.warning(
                "the leaf `%s` of a batch holds integers that %s does not: JAX cuts them off, so that different ones "
                "become equal. Number them anew, give them as strings where they are names, or switch on "
                "jax_enable_x64.",
                name,
                narrow.dtype,
            )


def is_wide(leaf: Any) -> bool:
    """Says whether a step takes a leaf in fewer bits than it has."""
    return isinstance(leaf, np.ndarray) and leaf.dtype.kind in "iu" and leaf.dtype.itemsize == 8


def wide_leaves(batch: Batch) -> list[tuple[str, int]]:
    """Returns the name and the place, in tree order, of every leaf that a step takes in fewer bits than it has."""
    if jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        return []
    return [(name, index) for index, (name, leaf) in enumerate(named_leaves(batch)) if is_wide(leaf)]


class Parted(Iterator[Any]):
    """The batches as a step can take them.

    Attributes:
        host: of the last batch, the arrays that stay on the host, by path name.

    Args:
        batches: as they come.
        warned: of the trainer.
    """

    def __init__(self, batches: Iterator[Any], warned: Warned) -> None:
        self._batches, self._warned = batches, warned
        self._begun = self._mixed = False
        self._wide: list[tuple[str, int]] = []
        self.host: dict[str, np.ndarray] = {}

    def __next__(self) -> Any:
        batch = next(self._batches)
        if self._begun and not self._mixed and not self._wide:
            return batch
        if not self._begun:
            self._begun, self._mixed = True, any(map(stays_on_host, jax.tree.leaves(batch)))
        if self._mixed:
            batch, self.host = parted(batch)
            for name, leaf in self.host.items():
                self._warned.host(name, leaf)
        # Of the first batch that has them; the form of a batch is that of the first.
        self._wide = self._wide or wide_leaves(batch)
        if self._wide:
            leaves = jax.tree.leaves(batch)
            for name, index in self._wide:
                if index < len(leaves) and is_wide(leaves[index]):
                    self._warned.check_wide(name, leaves[index])
            self._wide = [one for one in self._wide if one[0] not in self._warned.names]
        return batch


def parted(batch: Batch) -> tuple[Batch, dict[str, np.ndarray]]:
    """Returns a batch without the leaves that no step can take, and those by path name.

    A mapping lacks their keys; in tuples and lists None stands in their place. A list of strings is one leaf.
    """
    host: dict[str, np.ndarray] = {}

    def visit(node: Any, path: str) -> Any:
        if isinstance(node, dict):
            parts = {key: visit(value, f"{path}/{key}") for key, value in node.items()}
            return {key: part for key, part in parts.items() if part is not _OUT}
        if isinstance(node, list | tuple):
            if node and all(isinstance(item, str | bytes) for item in node):
                host[path[1:]] = np.asarray(node)
                return _OUT
            parts = [visit(item, f"{path}/{index}") for index, item in enumerate(node)]
            parts = [None if part is _OUT else part for part in parts]
            return type(node)(*parts) if hasattr(node, "_fields") else type(node)(parts)
        if not jax.tree_util.all_leaves([node]) or is_numeric(node) or not stays_on_host(node):
            return node
        host[path[1:]] = np.asarray(node)
        return _OUT

    rest = visit(batch, "")
    # A batch of nothing else is refused by its name.
    return (batch, {}) if rest is _OUT or not jax.tree.leaves(rest) else (rest, host)


def with_host(outputs: Any, host: Mapping[str, np.ndarray]) -> Any:
    """Returns what a prediction gave with the arrays beside it that stayed on the host, where it is a mapping."""
    return {**host, **outputs} if isinstance(outputs, Mapping) and host else outputs
