"""What a probe may ask of the passes that made a step: its rows, its gradient in pieces, its activations.

Owns the questions; the step answers them. All of it is traced.
"""

import abc
from typing import Any, NamedTuple

import jax

from trainkit._core.typing import PyTree


class Piece(NamedTuple):
    """A part of the examples of a step and their gradient, the same on every replica.

    Attributes:
        examples: `float32[]`, real ones; 0 where a part is padding alone.
        grads: of their mean loss, of the structure of the gradients of the step.
    """

    examples: jax.Array
    grads: PyTree


class Captured(NamedTuple):
    """What the modules returned in the forward pass over one batch of a step, on this replica.

    Attributes:
        outputs: a list of arrays by the path of a module, in the order of its calls; `""` is the model itself.
        mask: `bool[rows]`.
    """

    outputs: dict[str, list[jax.Array]]
    mask: jax.Array


class StepPasses(abc.ABC):
    """Answers what only some probes ask. What is not asked costs nothing."""

    @property
    @abc.abstractmethod
    def batch(self) -> Any:
        """The batch of the step, all of its rows on every replica; a tuple where gradients are accumulated."""

    @property
    @abc.abstractmethod
    def mask(self) -> Any:
        """`bool[rows]`, which rows are real; a tuple where gradients are accumulated."""

    @abc.abstractmethod
    def pieces(self, asker: str) -> list[Piece]:
        """Returns the gradient in at least two pieces: of the micro-batches, else of two halves of the batch.

        Raises:
            ValueError: there is no telling them apart; says why, and names who asked.
        """

    @abc.abstractmethod
    def captured(self, asker: str) -> list[Captured]:
        """Returns what the modules returned, by one more forward pass over each batch of the step.

        Raises:
            ValueError: the step is not made of passes of the loss; names who asked.
        """

    @abc.abstractmethod
    def sum(self, tree: PyTree) -> PyTree:
        """Returns sums over all replicas."""

    @abc.abstractmethod
    def max(self, tree: PyTree) -> PyTree:
        """Returns the largest values over all replicas."""
