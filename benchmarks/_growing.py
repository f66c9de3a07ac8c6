"""Contestants with many parameters, and with many callbacks that are not due."""

import functools
from typing import Any

import _workloads
import optax
from _contestants import compiled_step, fits, fitting, hand_loop, tuned_loop
from _task import Make, Running, Task
from _workloads import Workload
from flax import linen as nn

CALLBACKS = (0, 10, 100)


class Leaves(nn.Module):
    """W1's classifier with `leaves` parameters, all but one of them vectors added to the input."""

    leaves: int

    @nn.compact
    def __call__(self, x, *, train):
        for index in range(self.leaves - 1):
            x = x + self.param(f"shift{index}", nn.initializers.zeros, (1, 64))
        return nn.Dense(10, use_bias=False)(x)


def workload_of(task: Task) -> Workload:
    """Returns the workload with as many leaves as the task says."""
    leaves, data = task.options["leaves"], task.arrays
    return Workload(
        Leaves(leaves),
        optax.adam(1e-3),
        data,
        task.options["batch_size"],
        lambda batch: batch["image"],
        _workloads.image_losses,
    )


def by_hand(task: Task, tmp: str) -> Running:
    """The loop by hand."""
    workload = workload_of(task)
    return hand_loop(workload, compiled_step(workload), workload.batches())


def by_hand_tuned(task: Task, tmp: str) -> Running:
    """The loop by hand with the CPU settings."""
    return tuned_loop(workload_of(task))


def by_trainkit(task: Task, tmp: str, **arguments: Any) -> Running:
    """trainkit with nothing due."""
    import trainkit as tk

    workload = workload_of(task)
    quiet = tk.callbacks.LogMetrics(every=tk.Never())
    trainer = _workloads.trainer(workload, callbacks=[quiet], **arguments)
    return fits(trainer, tk.data.Arrays(workload.arrays, workload.batch_size, shuffle=True))


def with_callbacks(task: Task, tmp: str, *, count: int) -> Running:
    """W1 through trainkit with so many callbacks that have a hook for steps and are not due."""
    import trainkit as tk

    quiet = tk.callbacks.LogMetrics(every=tk.Never())
    waiting = [tk.callbacks.Lambda(every=tk.Never(), on_step=lambda info: None) for _ in range(count)]
    return fitting(task, callbacks=[quiet, *waiting])


CONTESTANTS: dict[str, Make] = {
    "by hand": by_hand,
    "by hand, CPU settings": by_hand_tuned,
    "trainkit": by_trainkit,
    "trainkit, one a call": functools.partial(by_trainkit, steps_per_call=1),
    "trainkit, one a call, no CPU settings": functools.partial(
        by_trainkit, steps_per_call=1, cpu_settings=False
    ),
    **{f"trainkit, {count} callbacks": functools.partial(with_callbacks, count=count) for count in CALLBACKS},
}
