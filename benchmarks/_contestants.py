"""The loops that are compared, each a function `make(task, tmp) -> Running`: by hand, and through trainkit."""

import ctypes
import functools
import io
import time
from collections.abc import Callable, Iterator
from typing import Any

import _workloads
import jax
import jax.numpy as jnp
from _task import Make, Running, Task
from _workloads import Metrics, Workload

SCHEDULER = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}

ONE_ARENA = ("W3", "W4")
"""Workloads whose step works on more than an arena of a thread holds."""

# By hand ------------------------------------------------------------------------------------------------------


def compiled_step(workload: Workload, options: dict[str, str] | None = None) -> Callable[..., Any]:
    """Returns the step by hand: jitted, state and metrics donated."""
    step = functools.partial(_workloads.hand_step, workload)
    return jax.jit(step, donate_argnums=(0, 1), compiler_options=options)


def by_hand(task: Task, tmp: str, *, sync: bool = False) -> Running:
    """The loop to beat: nothing is read back before the end. With `sync` the loss is, at every step."""
    workload = _workloads.load(task)
    return hand_loop(workload, compiled_step(workload), workload.batches(), sync=sync)


def by_hand_tuned(task: Task, tmp: str) -> Running:
    """The same with the settings trainkit chooses on CPUs: freed memory kept, the faster of two schedulers."""
    return tuned_loop(_workloads.load(task), one_arena=task.name in ONE_ARENA)


def tuned_loop(workload: Workload, *, one_arena: bool = False) -> Running:
    """Returns the loop by hand with the CPU settings; the scheduler is the faster one in a short trial."""
    keep_freed_memory(one_arena=one_arena)
    if jax.default_backend() != "cpu":
        return hand_loop(workload, compiled_step(workload), workload.batches())
    steps = {"default": compiled_step(workload), "memory": compiled_step(workload, SCHEDULER)}
    chosen = fastest(workload, steps)
    running = hand_loop(workload, steps[chosen], workload.batches())
    return running._replace(notes=lambda: {"scheduler": chosen})


def hand_loop(
    workload: Workload,
    step: Callable[..., Any],
    batches: Iterator[Any],
    *,
    start: Any = None,
    sync: bool = False,
) -> Running:
    """Returns the plain loop over `batches`, from the state of the workload or from `start`."""
    state, totals = workload.state() if start is None else start, Metrics.empty()

    def run(steps: int) -> int:
        nonlocal state, totals
        for _ in range(steps):
            state, totals, loss = step(state, totals, next(batches))
            if sync:
                float(loss)
        jax.block_until_ready((state, totals))
        return steps

    return Running(run, lambda: (state if start is None else state[0]).params)


def by_hand_ema(task: Task, tmp: str) -> Running:
    """The loop with an average of parameters and statistics, kept inside the step."""
    workload = _workloads.load(task)

    def step(states: Any, totals: Any, batch: Any) -> Any:
        state, averages = states
        state, totals, loss = _workloads.hand_step(workload, state, totals, batch)
        live = state.params, state.batch_stats
        averages = jax.tree.map(lambda old, new: 0.999 * old + 0.001 * new, averages, live)
        return (state, averages), totals, loss

    state = workload.state()
    averages = jax.tree.map(jnp.copy, (state.params, state.batch_stats))
    compiled = jax.jit(step, donate_argnums=(0, 1))
    return hand_loop(workload, compiled, workload.batches(), start=(state, averages))


def keep_freed_memory(*, one_arena: bool) -> None:
    """Tells glibc to keep freed blocks; elsewhere nothing happens."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    arenas = [(-8, 1)] if one_arena else []
    for option, value in (*arenas, (-3, 1 << 30), (-1, 2**31 - 1)):
        mallopt(option, value)


def fastest(workload: Workload, steps: dict[str, Callable[..., Any]]) -> str:
    """Returns the name of the step that is fastest in short runs taken in turns, on states of their own."""
    runs = {name: hand_loop(workload, step, workload.batches()).run for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    length = 2
    for _ in range(6):
        for name, run in runs.items():
            start = time.perf_counter()
            taken = run(length)
            times[name].append((time.perf_counter() - start) / taken)
        # The first round compiles; the others last a tenth of a second.
        length = max(2, round(0.1 / min(times[name][-1] for name in steps)))
    return min(steps, key=lambda name: min(times[name][1:]))


# trainkit -----------------------------------------------------------------------------------------------------


def trainkit(task: Task, tmp: str, **arguments: Any) -> Running:
    """trainkit with nothing due in between: metrics are computed at every step and read at the end."""
    return fitting(task, callbacks=[_log(never=True)], **arguments)


def trainkit_as_it_comes(task: Task, tmp: str) -> Running:
    """trainkit with no argument given: its metrics are read every 50 steps."""
    return fitting(task)


def trainkit_ema(task: Task, tmp: str) -> Running:
    """trainkit with an average of the weights, one step a call."""
    import trainkit as tk

    callbacks = [_log(never=True), tk.callbacks.EMA(0.999)]
    return fitting(task, callbacks=callbacks, steps_per_call=1)


def trainkit_full(task: Task, tmp: str, **arguments: Any) -> Running:
    """trainkit with all that users plug in."""
    import optax

    import trainkit as tk

    callbacks = [
        tk.callbacks.EMA(0.999),
        _log(),
        tk.callbacks.Progress(stream=Terminal()),
        tk.callbacks.LearningRate(schedule=optax.constant_schedule(1e-3)),
        tk.callbacks.NanGuard("skip"),
    ]
    return fitting(task, callbacks=callbacks, logdir=tmp, **arguments)


def fitting(task: Task, **arguments: Any) -> Running:
    """Returns a trainer that is fitted for as many steps as it is told."""
    import trainkit as tk

    workload = _workloads.load(task)
    trainer = _workloads.trainer(workload, **arguments)
    source = tk.data.Arrays(workload.arrays, workload.batch_size, shuffle=True)
    return fits(trainer, source)


def fits(trainer: Any, source: Any) -> Running:
    """Returns the runs of a trainer on one source."""

    def run(steps: int) -> int:
        jax.block_until_ready(trainer.fit(source, steps=steps).state.params)
        return steps

    return Running(run, lambda: trainer.state.params, lambda: {"summary": _choices(trainer)})


def _choices(trainer: Any) -> list[str]:
    """Returns the lines of the summary that say how steps are run."""
    words = ("steps per call", "allocator")
    return [line.strip() for line in trainer.summary().splitlines() if any(word in line for word in words)]


def _log(*, never: bool = False) -> Any:
    import trainkit as tk

    return tk.callbacks.LogMetrics(every=tk.Never() if never else tk.Every(steps=50))


class Terminal(io.TextIOBase):
    """A terminal that nobody looks at, so that the progress bar is drawn."""

    def isatty(self):
        return True

    def write(self, text):
        return len(text)


# Evaluation ---------------------------------------------------------------------------------------------------


def evaluation_by_hand(task: Task, tmp: str) -> Running:
    """Passes over the data in order, the metrics merged on the device and computed at the end of each."""
    workload = _workloads.load(task)
    step = jax.jit(functools.partial(_workloads.hand_eval, workload), donate_argnums=1)
    variables, found = workload.variables(), {}

    def one_pass() -> int:
        totals = Metrics.empty()
        batches = list(in_order(workload))
        for batch in batches:
            totals = step(variables, totals, batch)
        found.update({name: float(value) for name, value in totals.compute().items()})
        return len(batches)

    return Running(lambda steps: _passes(one_pass, steps), notes=lambda: found)


def evaluation_by_trainkit(task: Task, tmp: str) -> Running:
    """The same passes through `Trainer.evaluate`."""
    import trainkit as tk

    workload = _workloads.load(task)
    trainer = _workloads.trainer(workload)
    source, found = tk.data.Arrays(workload.arrays, workload.batch_size), {}

    def one_pass() -> int:
        found.update(trainer.evaluate(source))
        return len(source)

    return Running(lambda steps: _passes(one_pass, steps), notes=lambda: found)


def in_order(workload: Workload) -> Iterator[Any]:
    """Yields one pass of views of the data, the last batch what is left."""
    size = len(next(iter(workload.arrays.values())))
    for at in range(0, size, workload.batch_size):
        yield {name: leaf[at : at + workload.batch_size] for name, leaf in workload.arrays.items()}


def _passes(one_pass: Callable[[], int], steps: int) -> int:
    done = 0
    while done < steps:
        done += one_pass()
    return done


FIXED = (2, 4, 8, 16, 32, 64)
CONTESTANTS: dict[str, Make] = {
    "by hand": by_hand,
    "by hand, float(loss)": functools.partial(by_hand, sync=True),
    "by hand, CPU settings": by_hand_tuned,
    "by hand, EMA": by_hand_ema,
    "trainkit": trainkit,
    "trainkit, as it comes": trainkit_as_it_comes,
    "trainkit, one a call": functools.partial(trainkit, steps_per_call=1),
    "trainkit, one a call, no CPU settings": functools.partial(
        trainkit, steps_per_call=1, cpu_settings=False
    ),
    **{f"trainkit, {k} a call": functools.partial(trainkit, steps_per_call=k) for k in FIXED},
    "trainkit, all plugged in": trainkit_full,
    "trainkit, EMA": trainkit_ema,
    "evaluation by hand": evaluation_by_hand,
    "evaluation, trainkit": evaluation_by_trainkit,
}
