"""The probe: a function of a step whose values the host sees, computed in the steps in which they are due alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

from trainkit._core.typing import PyTree
from trainkit.hooks._hook import StepValues


class StepProbe(NamedTuple):
    """What a callback wants to know of the steps at which it is due, and of no others.

    Other than a step hook it has no memory and is no part of the ordinary step: the step before a callback with a
    probe is called runs as a second program, which returns the values beside the next state.

    Attributes:
        name: unique among the probes of a trainer.
        fn: `fn(values) -> pytree of arrays`, pure, with the same result on every replica. `values.state` is the
            state after the step, hooks and refusals included.

    Example:
        >>> import optax
        >>> probe = StepProbe("update_norm", lambda values: optax.tree.norm(values.updates))
    """

    name: str
    fn: Callable[[StepValues], PyTree]


def run_probes(probes: tuple[StepProbe, ...], values: StepValues) -> dict[str, Any]:
    """Returns what each probe says of a step, by its name."""
    return {probe.name: probe.fn(values) for probe in probes}
