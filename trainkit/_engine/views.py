"""Which weights are meant by `weights=`, and the compiled views that callbacks give of a state.

Owns the choice and the programs; not what a view shows, nor the batch statistics that it may want.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from trainkit._core.jaxprs import inputs_read
from trainkit._core.state import TrainState, key_impl, with_raw_key, with_typed_key
from trainkit._core.tree import differences, named_leaves, signature
from trainkit._core.typing import PyTree
from trainkit.hooks._view import View
from trainkit.parallel._strategy import Role, Strategy

AVERAGED, LIVE, OTHER_NAME = "averaged", "live", "ema"
"""The first view, no view, and the other name of the first."""


class Views:
    """The views of one trainer.

    Args:
        views: in the order of the callbacks that give them.
        strategy: compiles them.
    """

    def __init__(self, views: Sequence[View], strategy: Strategy) -> None:
        self.all, self._strategy = tuple(views), strategy
        self._programs: dict[tuple[str, str], Callable[[TrainState], dict[str, PyTree]]] = {}

    def chosen(self, weights: str) -> View | None:
        """Returns the view that `weights` names, None for the state as it is.

        Raises:
            ValueError: there is none of that name.
        """
        named = {view.name: view for view in self.all}
        if weights in named:
            return named[weights]
        if weights in (AVERAGED, OTHER_NAME):
            return self.all[0] if self.all else None
        if weights == LIVE:
            return None
        names = "".join(f", {name!r}" for name in named)
        raise ValueError(
            f"weights={weights!r}: the choices are 'averaged' (or 'ema', its other name), which is the first view "
            f"that a callback gives, and 'live'{names}."
        )

    def read(self, view: View, state: TrainState) -> TrainState:
        """Returns `state` as `view` shows it, by a program that is compiled once and kept.

        Raises:
            TypeError: the view is no train state.
            ValueError: it is of another structure.
        """
        impl = key_impl(state)
        if (view.name, impl) not in self._programs:
            self._programs[view.name, impl] = self._strategy.compile(
                lambda raw: shown(view, with_typed_key(raw, impl)), inputs=(Role.STATE,), outputs=Role.STATE
            )
        return state.replace(**self._programs[view.name, impl](with_raw_key(state)))

    def reads(self, state: TrainState) -> set[str]:
        """Returns the path names of what in a state the views look at."""
        names = [name for name, _ in named_leaves(state)]
        found = set[str]()
        for view in self.all:
            jaxpr = jax.make_jaxpr(lambda state, view=view: shown(view, state))(state).jaxpr
            found |= {name for name, read in zip(names, inputs_read(jaxpr), strict=True) if read}
        return found


def shown(view: View, state: TrainState) -> dict[str, PyTree]:
    """Returns the fields of a state in which its view is another, traced: nothing else is computed or copied."""
    new = view.fn(state)
    if not isinstance(new, TrainState):
        raise TypeError(
            f"the view {view.name!r} returned {type(new).__name__}: return the state, e.g. state.replace(params=...)."
        )
    found = differences(signature(state), signature(new))
    if found or jax.tree.structure(new) != jax.tree.structure(state):
        raise ValueError(
            f"the view {view.name!r} is of another structure than the state: {'; '.join(found) or 'other nodes'}. Keep "
            "structure, shapes and dtypes: the model and what is compiled for it stay."
        )
    fields = [field.name for field in dataclasses.fields(state) if field.metadata.get("pytree_node", True)]
    return {
        name: getattr(new, name) for name in fields if not _same(getattr(new, name), getattr(state, name))
    }


def _same(new: Any, old: Any) -> bool:
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    return all(one is other for one, other in pairs)
