"""Contestants with one callback each, due never and due every 50 steps. A further callback is one line of `table`."""

import functools
from collections.abc import Callable
from typing import Any

import optax
from _contestants import fitting
from _task import Make, Running, Task

NONE = "none"
NEVER, OFTEN = "not due", "every 50 steps"


def _loss_of(values: Any) -> Any:
    return values.loss


def table() -> dict[str, Callable[[Any], Any]]:
    """Returns by name what makes a callback that is due at a cadence."""
    import trainkit as tk

    made = tk.callbacks
    return {
        "ActivationStats": made.ActivationStats,
        "GradientNoiseScale": made.GradientNoiseScale,
        "LearningRate": lambda every: made.LearningRate(every, schedule=optax.constant_schedule(1e-3)),
        "LogMetrics": lambda every: made.LogMetrics(every=every),
        "NanGuard": lambda every: made.NanGuard("skip", every),
        "Probe": lambda every: made.Probe(_loss_of, every=every),
        "SpikeGuard": lambda every: made.SpikeGuard(every=every),
        "Watch": made.Watch,
        "Watch with histograms": lambda every: made.Watch(every, histograms=True),
    }


def rows() -> list[tuple[str, str]]:
    """Returns the callbacks and when each is due."""
    return [(name, due) for name in table() for due in (NEVER, OFTEN)]


def with_one(task: Task, tmp: str, *, name: str, due: str) -> Running:
    """The task's model through trainkit with one callback, and with nothing else that is due."""
    import trainkit as tk

    every = tk.At(steps=(10**9,)) if due == NEVER else tk.Every(steps=50)
    quiet = [] if name == "LogMetrics" else [tk.callbacks.LogMetrics(every=tk.Never())]
    wanted = [] if name == NONE else [table()[name](every)]
    return fitting(task, callbacks=[*quiet, *wanted], steps_per_call=task.options["steps_per_call"])


CONTESTANTS: dict[str, Make] = {
    NONE: functools.partial(with_one, name=NONE, due=NEVER),
    **{f"{name}, {due}": functools.partial(with_one, name=name, due=due) for name, due in rows()},
}
