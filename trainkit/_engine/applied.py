"""Functions of the user that run on the model at any moment: what they may be given, and how long they are kept.

Owns no compilation.
"""

import collections
import logging
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np

from trainkit._core.tree import path_name
from trainkit._core.typing import PyTree

_LOG = logging.getLogger("trainkit")
_MOST_KEPT = 32


class KeptByFunction:
    """Compiled programs by the function they were made of; of many, those used last."""

    def __init__(self) -> None:
        self._programs: collections.OrderedDict[Hashable, Callable[..., Any]] = collections.OrderedDict()
        self._codes: dict[Any, int] = {}

    def get(self, key: tuple[str, Callable[..., Any]], make: Callable[[], Callable[..., Any]]) -> Any:
        """Returns the program under `key`, whose last part is the function; made where it is not there."""
        if key not in self._programs:
            self._note(key[-1])
            self._programs[key] = make()
            if len(self._programs) > _MOST_KEPT:
                self._programs.popitem(last=False)
        self._programs.move_to_end(key)
        return self._programs[key]

    def _note(self, fn: Callable[..., Any]) -> None:
        code = getattr(fn, "__code__", None)
        if code is None:
            return
        self._codes[code] = self._codes.get(code, 0) + 1
        if self._codes[code] == 3:
            _LOG.warning(
                "apply was given three functions made anew by the same line (%s:%d): each is compiled. Define it "
                "once, outside of the hook, and give what changes as further arguments.",
                code.co_filename,
                code.co_firstlineno,
            )


def check_applied(fn: object, args: PyTree) -> None:
    """Refuses what can't be applied.

    Args:
        fn: to be called with the bound module and `args`.
        args: trees of arrays and numbers.

    Raises:
        TypeError: `fn` is no function, or a leaf of `args` neither an array nor a number.
    """
    if not callable(fn):
        raise TypeError(
            f"apply takes a function of the bound module, got {type(fn).__name__}; e.g. "
            "lambda model, x: model.encode(x)."
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(args):
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float, complex)):
            raise TypeError(
                f"apply was given {type(leaf).__name__} as argument {path_name(path)}; arguments are trees of arrays "
                "and numbers. Bind anything else once, outside of the hook: fn = functools.partial(fn, mode='mean')."
            )
