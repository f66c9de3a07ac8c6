"""What a callback may change of a train state between two steps. Changes nothing itself."""

import dataclasses

import jax

from trainkit._core.state import TrainState
from trainkit._core.tree import differences, signature


def check_updated(state: TrainState, new: object, *, by: str) -> None:
    """Refuses an update after which the step would have to compile anew, or would be another.

    Args:
        state: before it.
        new: after it.
        by: name of who asked for it.

    Raises:
        TypeError: `new` is no train state.
        ValueError: structure, shapes or dtypes changed, or something that is compiled into the step.
    """
    if not isinstance(new, TrainState):
        raise TypeError(
            f"{by} returned an Update whose function returned {type(new).__name__}: return the state, e.g. "
            "state.replace(params=...)."
        )
    fixed = [name for name in _static(state) if not _same(getattr(new, name, None), getattr(state, name))]
    if fixed:
        raise ValueError(
            f"{by} returned an Update that replaces state.{fixed[0]}, which is compiled into the step and is no array. "
            "What is to change during a fit goes into the optimizer state: make the optimizer with "
            "optax.inject_hyperparams and replace the value in state.opt_state; for another optimizer end the fit "
            "and make another trainer."
        )
    changed = differences(signature(state), signature(new))
    if changed:
        raise ValueError(
            f"{by} returned an Update that changes the structure of the state: {'; '.join(changed)}. Keep "
            "structure, shapes and dtypes, so that the step need not compile again."
        )
    if jax.tree.structure(new) != jax.tree.structure(state):
        raise ValueError(
            f"{by} returned an Update that changes the structure of the state: {jax.tree.structure(new)} for "
            f"{jax.tree.structure(state)}. Keep the kinds of its nodes."
        )


def _static(state: TrainState) -> list[str]:
    return [field.name for field in dataclasses.fields(state) if not field.metadata.get("pytree_node", True)]


def _same(new: object, old: object) -> bool:
    return new is old or new == old
