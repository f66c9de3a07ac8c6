"""A script by hand, up to its first finished step of W4: as Flax's guides write it, or with more care.

Arguments: `eager` or `jitted` initialisation, and optionally the folder of JAX's persistent compilation cache.
"""

import pathlib
import sys

import _data
import _workloads
import jax
import jax.numpy as jnp
from _contestants import compiled_step
from _workloads import Metrics, State

how, small, data, *cache = sys.argv[1:]
if cache:
    jax.config.update("jax_compilation_cache_dir", cache[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
workload = _workloads.load(_data.task("W4", small=small == "small", data=pathlib.Path(data)))
if how == "jitted":
    state = workload.state()
else:
    variables = workload.model.init(jax.random.key(0), workload.inputs(workload.first()), train=True)
    state = State.create(
        apply_fn=workload.model.apply, params=variables["params"], tx=workload.tx, batch_stats={}
    ).replace(step=jnp.zeros((), jnp.int32))
step = compiled_step(workload)
state, totals, loss = step(state, Metrics.empty(), next(workload.batches()))
jax.block_until_ready(state)
print("first step done", flush=True)
sys.stdin.read()
