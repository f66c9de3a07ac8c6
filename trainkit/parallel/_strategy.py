"""What the step and the loop need of a device layout. Owns no model, no metric and no order of events."""

import abc
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from trainkit._typing import Batch, PyTree

Forward = Callable[..., tuple[Any, Any, Any]]
"""`forward(variables, batch, mask, step, rng) -> (losses, outputs, updated collections)`."""


class Strategy(abc.ABC):
    """How one step runs on the devices at hand.

    A subclass answers: into how many parts a batch is divided, how host arrays get to the devices, how a
    function over the whole batch is made from the user's loss, and how a step is compiled.
    """

    @property
    @abc.abstractmethod
    def shards(self) -> int:
        """Number of parts a batch is divided into; padded batches are multiples of it."""

    @property
    @abc.abstractmethod
    def blocks_every(self) -> int | None:
        """Steps after which the loop waits for the devices; None where the backend limits itself."""

    @abc.abstractmethod
    def map_forward(self, forward: Forward) -> Forward:
        """Returns a function of the same signature over the whole batch, with the batch axis bound by name."""

    @abc.abstractmethod
    def compile(self, fn: Callable[..., Any], *, donate: tuple[int, ...] = ()) -> Callable[..., Any]:
        """Returns `fn` compiled for the devices; arguments are what `place` and `replicate` return."""

    @abc.abstractmethod
    def place(self, batch: Batch) -> Batch:
        """Returns a host batch as the compiled step takes it, divided over the devices where it can be."""

    @abc.abstractmethod
    def replicate(self, tree: PyTree) -> PyTree:
        """Returns `tree` as the compiled step takes what every device holds whole."""

    @abc.abstractmethod
    def fetch(self, tree: PyTree) -> PyTree:
        """Returns arrays of a compiled step as NumPy arrays; waits for them."""

    @abc.abstractmethod
    def describe(self) -> str:
        """Returns the layout in a few words for people, e.g. `data=8 on cpu`."""


def to_numpy(tree: PyTree) -> PyTree:
    """Returns the arrays of `tree` on the host; waits for them."""
    return jax.tree.map(np.asarray, tree)
