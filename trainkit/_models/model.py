"""What a step needs of a module system: functions run in the scope of a module, and the collections they changed.

Owns no state; another module system joins by one more subclass.
"""

import abc
import contextlib
from collections.abc import Callable, Set
from typing import Any

import jax

from trainkit._core.typing import Variables

ScopedFunction = Callable[..., Any]
"""A function whose first argument is the bound module."""


Interceptor = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""`intercept(name, method, args, kwargs)` returns what the call gives; `name` is e.g. `CNN/Conv_0 (__call__)`."""


class Model(abc.ABC):
    """What a step needs of a module system."""

    apply_fn: Callable[..., Any]

    @abc.abstractmethod
    def init(self, fn: ScopedFunction, rng: jax.Array, *args: Any) -> dict[str, Any]:
        """Returns the variables that running `fn(bound module, *args)` creates, without values sown on the way."""

    @abc.abstractmethod
    def apply(
        self, fn: ScopedFunction, variables: Variables, rng: jax.Array, *args: Any, train: bool
    ) -> tuple[Any, dict[str, Any]]:
        """Runs `fn(bound module, *args)` on `variables`.

        Returns:
            Its result, and the collections it may have changed, without values sown on the way.
        """

    @abc.abstractmethod
    def intercepting(self, intercept: Interceptor) -> contextlib.AbstractContextManager[None]:
        """Has every call of a method of a module, while a function runs in its scope, go through `intercept`."""

    @abc.abstractmethod
    def module(self, variables: Variables, rng: jax.Array) -> Any:
        """Returns the module with these variables, not training: for people to call."""

    def names(self) -> dict[str, tuple[str | None, ...]]:
        """Returns the names of the mesh axes that divide the dimensions of a parameter, by path, where it says so."""
        return {}

    def captured(
        self, fn: ScopedFunction, variables: Variables, rng: jax.Array, *args: Any
    ) -> dict[str, Any]:
        """Runs `fn(bound module, *args)` in training and returns what each module returned.

        Returns:
            Nests of the names of modules, with their outputs in a tuple under `"__call__"`.

        Raises:
            TypeError: modules of this kind can't be watched.
        """
        raise TypeError("activations are captured of flax.linen modules only; leave ActivationStats out.")

    @abc.abstractmethod
    def measuring(self) -> tuple["Model", Set[tuple[str, ...]]]:
        """Returns the model such that a training call leaves the statistics of its batch alone, and drops nothing out.

        Returns:
            The model, and the paths of the layers in `batch_stats` that were seen to do so while it was traced. The
            other layers do what they do in training.
        """
