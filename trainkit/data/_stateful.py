"""Loaders and iterators that can tell where they stand and be set back there, whatever library they are of.

Owns the two protocols in use, and positions as checkpoints hold them; not when one is asked for.
"""

import logging
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from trainkit.data._tensors import is_torch

_LOG = logging.getLogger("trainkit")
_TENSOR, _ITEMS = "__tensor__", "__items__"


@runtime_checkable
class _StateDict(Protocol):
    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


@runtime_checkable
class _State(Protocol):
    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> Any: ...


class Stateful(NamedTuple):
    """How something tells where it stands and is set back there."""

    get: Callable[[], Any]
    set: Callable[[Any], Any]


def stateful(thing: Any) -> Stateful | None:
    """Returns how `thing` tells its position (torchdata's protocol, or Grain's), None where it can't."""
    if isinstance(thing, _StateDict):
        get, put = thing.state_dict, thing.load_state_dict
    elif isinstance(thing, _State):
        get, put = thing.get_state, thing.set_state
    else:
        return None
    return Stateful(lambda: _kept(thing, get()), lambda state: put(_given_back(state)))


def _kept(thing: Any, state: Any) -> Any:
    try:
        return _packed(state)
    except TypeError as error:
        _LOG.warning(
            "the position of the source (%s) can't be kept, because it holds %s; a resumed run reads up to it.",
            type(thing).__name__,
            error,
        )
        return None


def _packed(state: Any) -> Any:
    """Returns a copy of `state` as a checkpoint holds it, with the tensors of torch as arrays."""
    if state is None or isinstance(state, bool | str | bytes | numbers.Number):
        return state
    if isinstance(state, np.ndarray | jax.Array):
        return np.array(state)
    if is_torch(state):
        return {_TENSOR: np.array(state.detach().cpu().numpy())}
    if isinstance(state, Mapping):
        items = [[_packed(key), _packed(value)] for key, value in state.items()]
        plain = all(isinstance(key, str) and not key.startswith("__") for key, _ in items)
        return dict(items) if plain else {_ITEMS: items}
    if type(state) in (list, tuple):
        return type(state)(_packed(item) for item in state)
    raise TypeError(f"a {type(state).__name__}")


def _given_back(state: Any) -> Any:
    """Undoes `_packed`."""
    if isinstance(state, Mapping):
        if _ITEMS in state:
            return {_given_back(key): _given_back(value) for key, value in state[_ITEMS]}
        if _TENSOR in state:
            import torch  # pyright: ignore[reportMissingImports]

            return torch.from_numpy(np.array(state[_TENSOR]))
        return {key: _given_back(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_given_back(item) for item in state)
    return state
