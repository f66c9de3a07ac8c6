"""Contestants that differ in how batches get to the step."""

import dataclasses
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import _data
import _workloads
import jax
import jax.numpy as jnp
import numpy as np
from _contestants import by_hand, compiled_step, fits, hand_loop, trainkit
from _task import Make, Running, Task
from _workloads import Workload

# On W1, whose step is short ------------------------------------------------------------------------------------


def with_device_put(task: Task, tmp: str) -> Running:
    """By hand, each batch put on the device before the call."""
    workload = _workloads.load(task)
    return hand_loop(workload, compiled_step(workload), map(jax.device_put, workload.batches()))


def with_thread(task: Task, tmp: str) -> Running:
    """By hand, batches made and put on the device by a thread."""
    workload = _workloads.load(task)
    return hand_loop(workload, compiled_step(workload), ahead(map(jax.device_put, workload.batches())))


def with_resident_data(task: Task, tmp: str) -> Running:
    """By hand, the data on the device and the rows of a batch gathered inside the step."""
    workload = _workloads.load(task)
    arrays, size = jax.device_put(workload.arrays), len(next(iter(workload.arrays.values())))

    def gathered(state: Any, totals: Any, arrays: Any, rows: Any) -> Any:
        batch = jax.tree.map(lambda leaf: leaf[rows], arrays)
        return _workloads.hand_step(workload, state, totals, batch)

    compiled = jax.jit(gathered, donate_argnums=(0, 1))
    numbers = _data.batches({"row": np.arange(size, dtype=np.int32)}, workload.batch_size)
    rows = (batch["row"] for batch in numbers)
    return hand_loop(workload, lambda state, totals, rows: compiled(state, totals, arrays, rows), rows)


def trainkit_host_data(task: Task, tmp: str) -> Running:
    """trainkit on batches that come from an iterable of NumPy arrays, one step a call or as it chooses."""
    return _fitted_to_batches(_workloads.load(task))


def ahead(batches: Iterator[Any], size: int = 2) -> Iterator[Any]:
    """Yields `batches`, which a thread makes up to `size` ahead."""
    waiting: queue.Queue[Any] = queue.Queue(size)

    def fill() -> None:
        for batch in batches:
            waiting.put(batch)

    # A daemon: the batches are without end, and so is the thread.
    threading.Thread(target=fill, daemon=True).start()
    while True:
        yield waiting.get()


class Passes:
    """Host batches as an iterable that a trainer knows nothing about, of `length` in each pass."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches, self.length = batches, 1

    def __iter__(self):
        return itertools.islice(self._batches, self.length)


def _fitted_to_batches(workload: Workload, batches: Iterator[Any] | None = None) -> Running:
    import trainkit as tk

    quiet = tk.callbacks.LogMetrics(every=tk.Never())
    source = Passes(batches or workload.batches())
    trainer = _workloads.trainer(workload, callbacks=[quiet])

    def run(steps: int) -> int:
        # A whole pass: a fit that begins inside of one reads what lies before once more.
        source.length = steps
        jax.block_until_ready(trainer.fit(source, epochs=1).state.params)
        return steps

    return fits(trainer, source)._replace(run=run)


# A batch that takes as long as a step --------------------------------------------------------------------------


def burning(task: Task) -> Workload:
    """Returns W1 with `loops` small matrix products in its loss, which cost time and change nothing."""
    workload, loops = _workloads.load(task._replace(name="W1")), task.options["loops"]

    def losses(logits: jax.Array, batch: Any) -> Any:
        values, outputs = workload.losses(logits, batch)
        start = jax.lax.stop_gradient(batch["image"][:64] + logits.mean())
        burnt = jax.lax.fori_loop(0, loops, lambda _, held: jnp.tanh(held @ held), start)
        return values + 1e-30 * burnt.mean(), outputs

    return dataclasses.replace(workload, losses=losses)


def slow(batches: Iterator[Any], wait: float) -> Iterator[Any]:
    """Yields `batches`, each after so many seconds of waiting, as for a disk or a network."""
    for batch in batches:
        time.sleep(wait)
        yield batch


def step_alone(task: Task, tmp: str) -> Running:
    """The loop by hand with batches at no cost."""
    workload = burning(task)
    return hand_loop(workload, compiled_step(workload), workload.batches())


def source_alone(task: Task, tmp: str) -> Running:
    """The batches, and no step."""
    batches = slow(_workloads.load(task._replace(name="W1")).batches(), task.options["wait"])
    return Running(lambda steps: sum(1 for _ in itertools.islice(batches, steps)))


def slow_by_hand(task: Task, tmp: str, wrap: Callable[[Iterator[Any]], Iterator[Any]] = iter) -> Running:
    """The loop by hand over the slow source; JAX's own queue of dispatched steps already overlaps the two."""
    workload = burning(task)
    batches = wrap(slow(workload.batches(), task.options["wait"]))
    return hand_loop(workload, compiled_step(workload), batches)


def slow_by_hand_waiting(task: Task, tmp: str) -> Running:
    """The loop by hand over the slow source that reads the loss at each step: the sum of both times."""
    workload = burning(task)
    batches = slow(workload.batches(), task.options["wait"])
    return hand_loop(workload, compiled_step(workload), batches, sync=True)


def slow_through_trainkit(task: Task, tmp: str) -> Running:
    """trainkit over the slow source."""
    workload = burning(task)
    return _fitted_to_batches(workload, slow(workload.batches(), task.options["wait"]))


CONTESTANTS: dict[str, Make] = {
    "by hand": by_hand,
    "by hand, device_put": with_device_put,
    "by hand, thread": with_thread,
    "by hand, resident": with_resident_data,
    "trainkit": trainkit,
    "trainkit, host data": trainkit_host_data,
    "step alone": step_alone,
    "source alone": source_alone,
    "slow source, by hand": slow_by_hand,
    "slow source, float(loss)": slow_by_hand_waiting,
    "slow source, trainkit": slow_through_trainkit,
}
