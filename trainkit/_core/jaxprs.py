"""What a traced function holds: operations, and memory. Owns no trace; runs nothing."""

from collections.abc import Iterator
from typing import Any

import jax.extend.core as jex

_LIGHT_BYTES = 2**20


def convolves(jaxpr: Any) -> bool:
    """Says whether there is a convolution: XLA runs those many times slower in loops on a CPU."""
    return "conv_general_dilated" in _operations(jaxpr)


def is_light(jaxpr: Any) -> bool:
    """Says whether a CPU runs it in less time than a host takes to call it, and as well in a loop: a rule of thumb."""
    heavy = {"conv_general_dilated", "scan", "while"}
    size = sum(map(_bytes, jaxpr.invars)) + peak_bytes(jaxpr)
    return size <= _LIGHT_BYTES and _operations(jaxpr).isdisjoint(heavy)


def peak_bytes(jaxpr: Any) -> int:
    """Returns the most bytes of values alive at once, each from the operation that makes it to its last reader."""
    last = {var: index for index, eqn in enumerate(jaxpr.eqns) for var in _variables(eqn.invars)}
    results = set(_variables(jaxpr.outvars))
    alive: dict[Any, int] = {}
    held = most = 0
    for index, eqn in enumerate(jaxpr.eqns):
        made = {var: _bytes(var) for var in eqn.outvars}
        inside = max(map(peak_bytes, jex.jaxprs_in_params(eqn.params)), default=0)
        most = max(most, held + max(inside, sum(made.values())))
        for var in made.keys() & last.keys() - results:
            alive[var] = made[var]
            held += made[var]
        for var in set(_variables(eqn.invars)):
            if last[var] == index:
                held -= alive.pop(var, 0)
    return most


def inputs_read(jaxpr: Any) -> list[bool]:
    """Returns of each input whether anything is computed from it, or it is a result."""
    read = {var for eqn in jaxpr.eqns for var in _variables(eqn.invars)} | set(_variables(jaxpr.outvars))
    return [var in read for var in jaxpr.invars]


def _operations(jaxpr: Any) -> set[str]:
    inner = (_operations(one) for eqn in jaxpr.eqns for one in jex.jaxprs_in_params(eqn.params))
    return {eqn.primitive.name for eqn in jaxpr.eqns}.union(*inner)


def _variables(atoms: Any) -> Iterator[Any]:
    return (atom for atom in atoms if not isinstance(atom, jex.Literal))


def _bytes(var: Any) -> int:
    aval = var.aval
    return aval.size * getattr(aval.dtype, "itemsize", 0) if hasattr(aval, "dtype") else 0
