"""The table of parameters that `Trainer.summary` returns. Owns no state."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from clu import parameter_overview

from trainkit._core.held import bytes_of, bytes_per_device, sharding_of
from trainkit._core.state import TrainState
from trainkit._core.tree import path_name
from trainkit._core.typing import PyTree


@dataclasses.dataclass(frozen=True)
class _Row:
    name: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    bytes: int
    group: str = ""
    sharding: str = ""
    bytes_per_device: int = 0


_SHARDED = ("sharding", "bytes_per_device")


def overview(
    state: TrainState, settings: Mapping[str, str], group_of: Callable[[str], str | None] | None = None
) -> str:
    """Returns a table of the parameters, and the totals of what the state holds.

    On more than one device with the sharding of each parameter and the bytes that one device holds.

    Args:
        state: the train state.
        settings: how the steps run, in a few words each, by name.
        group_of: returns the group of a parameter by its path; None where there are no groups to be shown.
    """
    several = any(len(_devices(leaf)) > 1 for leaf in jax.tree.leaves(state))
    left_out = (*(() if several else _SHARDED), *(("group",) if group_of is None else ()))
    columns = [field.name for field in dataclasses.fields(_Row) if field.name not in left_out]
    table = parameter_overview.make_table(_rows(state.params, group_of), column_names=columns)
    parts = {
        "params": state.params,
        "batch_stats": state.batch_stats,
        **state.collections,
        "opt_state": state.opt_state,
        **{f"hooks/{name}": memory for name, memory in state.hooks.items()},
    }
    held = {name: tree for name, tree in parts.items() if tree}
    lines = [_total(name, tree, several) for name, tree in held.items()]
    said = [f"{name:<20} {words}" for name, words in settings.items()]
    return "\n".join([table, *lines, _total("total", list(held.values()), several), *said])


def _rows(params: PyTree, group_of: Callable[[str], str | None] | None) -> list[_Row]:
    named = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
    group_of = group_of or (lambda name: None)
    rows = [(path_name(path), nn.meta.unbox(leaf)) for path, leaf in named]
    return [_row(name, leaf, group_of(name) or "") for name, leaf in rows]


def _row(name: str, leaf: Any, group: str) -> _Row:
    return _Row(
        name=name,
        shape=leaf.shape,
        dtype=str(leaf.dtype),
        size=leaf.size,
        bytes=bytes_of(leaf),
        group=group,
        sharding=sharding_of(leaf),
        bytes_per_device=bytes_per_device(leaf),
    )


def _total(name: str, tree: PyTree, several: bool) -> str:
    leaves = jax.tree.leaves(tree)
    line = (
        f"{name:<20} {sum(leaf.size for leaf in leaves):>14,} values {sum(map(bytes_of, leaves)):>16,} bytes"
    )
    return f"{line} {sum(map(bytes_per_device, leaves)):>16,} per device" if several else line


def _devices(leaf: Any) -> set[Any]:
    return leaf.sharding.device_set if isinstance(leaf, jax.Array) else set()
