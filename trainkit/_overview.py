"""The table of parameters that `Trainer.summary` returns. Owns no state."""

import jax
from clu import parameter_overview

from trainkit._state import TrainState
from trainkit._typing import PyTree


def overview(state: TrainState, layout: str) -> str:
    """Returns names, shapes, counts and bytes of the parameters, and the totals of what the state holds.

    Args:
        state: the train state.
        layout: the strategy in a few words.
    """
    table = parameter_overview.get_parameter_overview(state.params, include_stats=False)
    parts = {
        "params": state.params,
        "batch_stats": state.batch_stats,
        **state.collections,
        "opt_state": state.opt_state,
        **{f"hooks/{name}": memory for name, memory in state.hooks.items()},
    }
    lines = [
        f"{name:<20} {_count(tree):>14,} values {_bytes(tree):>16,} bytes"
        for name, tree in parts.items()
        if tree
    ]
    return "\n".join([table, *lines, f"{'layout':<20} {layout}"])


def _count(tree: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _bytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
