"""How many floating point operations a step takes, as XLA counts them. Runs nothing, and owns no program."""

from typing import Any

import jax


def flops_of(single: jax.stages.Wrapped, example: Any, replicas: int) -> float | None:
    """Returns the operations of one step on all devices, None where the backend does not count them.

    Counted is the program as it is handed over, of which nothing is compiled; a backend that can't (of plugins, some)
    counts the compiled one, which JAX has where the step was called.

    Args:
        single: one step, compiled.
        example: shapes, dtypes and layouts of its arguments.
        replicas: how many devices run the program that is handed over; 1 where it is one for all of them.
    """
    lowered = single.trace(*example).lower()
    found = _counted(lowered)
    if found is not None:
        return found * replicas
    found = _counted(lowered.compile())  # of one device
    shardings = [leaf.sharding for leaf in jax.tree.leaves(example) if leaf.sharding is not None]
    devices = max((len(sharding.device_set) for sharding in shardings), default=1)
    return None if found is None else found * devices


def _counted(stage: Any) -> float | None:
    try:
        cost = stage.cost_analysis()
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        return None
    flops = cost.get("flops", 0.0) if isinstance(cost, dict) else 0.0
    return float(flops) if flops > 0 else None
