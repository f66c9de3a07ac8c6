"""Names for what a fit does, in the traces of `jax.profiler`. Owns whether they are given; takes no trace.

A process has one profiler, so this is of the process too. Where no trace runs nothing is named, which costs nothing.
"""

import contextlib
from collections.abc import Iterator

import jax.profiler

_wanted = [False]


def name_phases(wanted: bool) -> None:
    """Says whether phases are named from here on."""
    _wanted[0] = wanted


def phases_are_named() -> bool:
    """Says whether a trace runs in which phases are named."""
    return _wanted[0]


@contextlib.contextmanager
def phase(name: str, step: int | None = None) -> Iterator[None]:
    """Names what happens within in the trace that runs.

    Args:
        name: of the phase.
        step: updates completed before it, where it is a step: profilers divide the trace by them.
    """
    kind = jax.profiler.TraceAnnotation if step is None else jax.profiler.StepTraceAnnotation
    with kind(name, **({} if step is None else {"step_num": step})):
        yield
