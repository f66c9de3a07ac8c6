"""How many operations on floats a traced function takes, by the part that asked for them. Runs nothing.

Two for a multiply-add, one for everything else that computes, none for what only moves values.
"""

import collections
import math
import re
from typing import Any

import jax.extend.core as jex
import jax.numpy as jnp

_PART = "trainkit_part_{}_"
_FOUND = re.compile(r"trainkit_part_(\d+)_")
_MOVES = frozenset(
    {
        "broadcast_in_dim",
        "concatenate",
        "convert_element_type",
        "copy",
        "device_put",
        "dynamic_slice",
        "dynamic_update_slice",
        "gather",
        "iota",
        "pad",
        "reshape",
        "rev",
        "select_n",
        "slice",
        "sort",
        "split",
        "squeeze",
        "transpose",
        "bitcast_convert_type",
        "optimization_barrier",
        "reduce_precision",
        "sharding_constraint",
        "pvary",
        "all_gather",
        "ppermute",
        "axis_index",
        "name",
        "pure_callback",
        "debug_callback",
    }
)


def part(number: int) -> str:
    """Returns the `jax.named_scope` under which the operations of part `number` are counted."""
    return _PART.format(number)


def count(jaxpr: Any, outer: int | None = None) -> collections.Counter[int | None]:
    """Returns the operations of each part, those of none under None.

    A loop of unknown length counts once, and of alternatives the one that takes most.

    Args:
        jaxpr: of the function, open or closed.
        outer: the part in which it is called.
    """
    found: collections.Counter[int | None] = collections.Counter()
    for eqn in jaxpr.eqns:
        parts = _FOUND.findall(str(eqn.source_info.name_stack))
        own = int(parts[-1]) if parts else outer
        inner = list(jex.jaxprs_in_params(eqn.params))
        if not inner or eqn.primitive.name.startswith(("scatter", "reduce")):
            found[own] += _operations(eqn)
        elif eqn.primitive.name == "cond":
            found.update(max((count(one, own) for one in inner), key=lambda counted: counted.total()))
        else:
            times = _times(eqn)
            for one in inner:
                found.update({name: times * number for name, number in count(one, own).items()})
    return found


def _times(eqn: Any) -> int:
    if eqn.primitive.name == "shard_map":
        return math.prod(eqn.params["mesh"].shape.values())
    return eqn.params["length"] if eqn.primitive.name == "scan" else 1


def _operations(eqn: Any) -> int:
    name, out = eqn.primitive.name, eqn.outvars[0].aval if eqn.outvars else None
    if name in _MOVES or not jnp.issubdtype(getattr(out, "dtype", jnp.int32), jnp.inexact):
        return 0
    assert out is not None
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * out.size * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        features = eqn.params["dimension_numbers"].rhs_spec[0]
        kernel = eqn.invars[1].aval.shape
        return 2 * out.size * math.prod(kernel) // max(kernel[features], 1)
    if name.startswith(("reduce", "cum", "scatter")):
        return eqn.invars[-1 if name.startswith("scatter") else 0].aval.size
    return sum(var.aval.size for var in eqn.outvars)
