"""How a broken promise is told: an `AssertionError` that names it. Owns no promise."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from trainkit._core.tree import named_leaves
from trainkit._core.typing import Batch, PyTree

# Sums in another order differ by this much in float32 after a few steps.
_RTOL, _ATOL = 1e-3, 1e-5


def holds(condition: bool, promise: str) -> None:
    """Raises unless `condition`, which `promise` tells in words."""
    if not condition:
        raise AssertionError(f"broken promise: {promise}.")


@contextlib.contextmanager
def promised(promise: str) -> Iterator[None]:
    """Turns an exception into one that names the promise it breaks."""
    try:
        yield
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(
            f"broken promise: {promise}. It raised {type(error).__name__}: {error}"
        ) from error


def same_batches(promise: str, actual: list[Batch], expected: list[Batch]) -> None:
    """Raises unless both lists hold the same batches."""
    holds(len(actual) == len(expected), f"{promise}: {len(actual)} batches instead of {len(expected)}")
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        equal(f"{promise} (batch {index})", one, other)


def equal(promise: str, actual: PyTree, expected: PyTree) -> None:
    """Raises unless both trees are bitwise equal; names the leaf."""
    _compare(promise, actual, expected, np.array_equal)


def close(promise: str, actual: PyTree, expected: PyTree) -> None:
    """Raises unless both trees are equal up to the order of sums in float32; names the leaf."""
    _compare(promise, actual, expected, lambda a, b: np.allclose(a, b, rtol=_RTOL, atol=_ATOL))


def _compare(promise: str, actual: PyTree, expected: PyTree, agree: Callable[[Any, Any], bool]) -> None:
    ours, theirs = dict(named_leaves(actual)), dict(named_leaves(expected))
    holds(ours.keys() == theirs.keys(), f"{promise}: leaves {sorted(ours)} instead of {sorted(theirs)}")
    for name, value in theirs.items():
        got, wanted = np.asarray(ours[name]), np.asarray(value)
        holds(got.shape == wanted.shape, f"{promise}: {name} has shape {got.shape} instead of {wanted.shape}")
        holds(bool(agree(got, wanted)), f"{promise}: {name} is {got} instead of {wanted}")
