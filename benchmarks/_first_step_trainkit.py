"""A script through trainkit, up to its first finished step of W4. The argument is the log folder."""

import pathlib
import sys

import _data
import _workloads
import jax

import trainkit as tk

small, data, logdir = sys.argv[1:]


def tell(info):
    """Says that the first step is done, when it is."""
    jax.block_until_ready(info.state.params)
    print("first step done", flush=True)


workload = _workloads.load(_data.task("W4", small=small == "small", data=pathlib.Path(data)))
trainer = _workloads.trainer(
    workload,
    start=False,
    callbacks=[tk.callbacks.Lambda(every=tk.At(steps=(1,)), on_step=tell)],
    logdir=logdir,
)
source = tk.data.Arrays(workload.arrays, workload.batch_size, shuffle=True)
# Long enough for the trainer to plan as it does in earnest; whoever started this ends it before.
trainer.fit(source, steps=4 if small == "small" else 100_000)
