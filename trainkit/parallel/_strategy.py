"""What the step and the loop need of a device layout. Owns no model, no metric and no order of events."""

import abc
import enum
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax

from trainkit._core.typing import Batch, PyTree
from trainkit.parallel._hosts import to_host

Forward = Callable[..., tuple[Any, Any, Any]]
"""`forward(variables, batch, mask, step, rng) -> (losses, outputs, updated collections)`."""


class Role(enum.Enum):
    """What an argument or a result of a compiled step is to the devices."""

    STATE = "state"
    """The train state: laid out as the strategy lays out states."""
    WHOLE = "whole"
    """Small: whole on each device."""
    ROWS = "rows"
    """Leaves `[batch, ...]`: divided over the devices. 0-d leaves are whole."""


class Strategy(abc.ABC):
    """How one step runs on the devices at hand.

    A subclass answers: into how many parts a batch is divided, how arrays get to the devices and back, how a
    function over the whole batch is made from the user's loss, how sums become global, and how a step is
    compiled. `trainkit.testing.check_strategy` proves an implementation.
    """

    # Shape of the batch -------------------------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def shards(self) -> int:
        """Number of parts a batch is divided into; padded batches are multiples of it."""

    @property
    @abc.abstractmethod
    def in_flight(self) -> int | None:
        """Steps that may be dispatched ahead of the devices; None where the backend limits itself."""

    @abc.abstractmethod
    def example(self, batch: Batch) -> Batch:
        """Returns what one call of the user's loss sees of `batch`; traced."""

    # Inside a step: all traced ------------------------------------------------------------------------------

    @abc.abstractmethod
    def map_forward(self, forward: Forward) -> Forward:
        """Returns a function of the same signature over the rows of one program, with the batch axis bound.

        Its losses are `[rows]` or a scalar, its outputs `[rows, ...]`, and its collections those of one model.
        """

    @property
    @abc.abstractmethod
    def replica_axis(self) -> str | None:
        """Name of the mapped axis when a step is one program per device; None when it is one for all."""

    @abc.abstractmethod
    def merge_collections(self, updated: PyTree) -> PyTree:
        """Returns collections as every replica must hold them, from those of this one."""

    def sum(self, tree: PyTree) -> PyTree:
        """Returns sums over all replicas of what each has; `tree` itself when a step is one program."""
        return tree if self.replica_axis is None else jax.lax.psum(tree, self.replica_axis)

    def max(self, tree: PyTree) -> PyTree:
        """Returns the largest values over all replicas of what each has; `tree` itself when a step is one program."""
        return tree if self.replica_axis is None else jax.lax.pmax(tree, self.replica_axis)

    # Around a step ------------------------------------------------------------------------------------------

    def with_names(self, names: Mapping[str, tuple[str | None, ...]]) -> Self:
        """Returns this strategy for a model that says which axis divides each dimension of a parameter.

        Args:
            names: by path, e.g. `{"Dense_0/kernel": (None, "tensor")}`.
        """
        return self

    @abc.abstractmethod
    def compile(
        self,
        fn: Callable[..., Any],
        *,
        inputs: tuple[Role, ...],
        outputs: tuple[Role, ...] | Role,
        donate: tuple[int, ...] = (),
    ) -> Callable[..., Any]:
        """Returns `fn` compiled for the devices.

        Args:
            fn: a pure function.
            inputs: role of each argument.
            outputs: role of the result, or of each part of a tuple.
            donate: indices of the arguments whose buffers the results may take.
        """

    @abc.abstractmethod
    def place(self, batch: Batch) -> Batch:
        """Returns a host batch as the compiled step takes it; on several processes each gives the whole batch."""

    @abc.abstractmethod
    def replicate(self, tree: PyTree) -> PyTree:
        """Returns `tree` whole on each device."""

    @abc.abstractmethod
    def lay_out(self, state: PyTree) -> PyTree:
        """Returns a train state as the compiled step takes it."""

    def hold(self, tree: PyTree) -> PyTree:
        """Returns arrays that steps take and never change, on the devices: by default whole on each."""
        return self.replicate(tree)

    def shardings(self, state: PyTree) -> PyTree | None:
        """Returns where `lay_out` puts each leaf of a train state, whose leaves may be `jax.ShapeDtypeStruct`.

        A checkpoint is then read straight to the devices; None, the default, has it read to the host first.
        """
        return None

    @abc.abstractmethod
    def describe(self) -> str:
        """Returns the layout in a few words for people, e.g. `data=8 on cpu`."""

    def fetch(self, tree: PyTree) -> PyTree:
        """Returns arrays of a compiled step as NumPy arrays; waits for them. All processes must call."""
        return jax.tree.map(to_host, tree)

    @property
    def takes_host_batches(self) -> bool:
        """Whether `place` leaves NumPy arrays as they are and `compile` takes them so, of any leading dimensions."""
        return False

    @property
    def takes_units(self) -> bool:
        """Whether a batch may be one unit without rows (`batch_axis = None`): the loss must see it whole."""
        return False

    # Several processes --------------------------------------------------------------------------------------

    @property
    def processes(self) -> int:
        """Number of processes whose devices the steps run on."""
        return 1

    def own_rows(self, rows: int) -> slice:
        """Returns which rows of a batch of `rows` this process gives to `place_own`."""
        return slice(0, rows)

    def place_own(self, batch: Batch, rows: int) -> Batch:
        """Returns the batch of `rows` rows of which this process has `own_rows(rows)`, as `place` does."""
        return self.place(batch)
