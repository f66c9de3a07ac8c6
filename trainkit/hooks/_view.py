"""The view of a state through other weights, as a callback gives it. Owns neither averages nor the choice of a view."""

from collections.abc import Callable
from typing import Any, NamedTuple

from trainkit._core.state import TrainState
from trainkit._core.typing import PyTree


class Refresh(NamedTuple):
    """How the batch statistics of a view are estimated anew, from one pass over data.

    Attributes:
        data: a source, which must be there for several passes.
        wanted: `wanted(state) -> bool`, whether those that the state remembers are of other parameters; on the host.
        keep: `keep(state, batch_stats) -> state` that remembers them.
    """

    data: Any
    wanted: Callable[[TrainState], bool]
    keep: Callable[[TrainState, PyTree], TrainState]


class View(NamedTuple):
    """A train state as it is evaluated, predicted, exported and applied with.

    Attributes:
        name: by which `weights=` asks for it, unique among the views of a trainer.
        fn: `fn(state) -> TrainState`, pure and traced: the state with other parameters, or whatever else, in place,
            of the same structure, shapes and dtypes. Where it finds nothing to show it returns `state`.
        refresh: where batch statistics have to be estimated for what it shows; None for none.

    Example:
        >>> import jax
        >>> halved = View("halved", lambda state: state.replace(params=jax.tree.map(lambda p: p / 2, state.params)))
    """

    name: str
    fn: Callable[[TrainState], TrainState]
    refresh: Refresh | None = None
