"""The session these tests run in: eight devices, and a thread pool that cannot deadlock on them."""

import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def test_thread_pool_has_two_threads_per_device():
    assert int(os.environ["NPROC"]) >= 2 * jax.device_count()


def test_a_sum_over_all_devices_is_exact(devices):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=devices(8))
    rows = np.arange(32, dtype=np.float32).reshape(16, 2)
    sharded = jax.device_put(rows, NamedSharding(mesh, PartitionSpec("data")))
    assert len(sharded.addressable_shards) == 8
    np.testing.assert_array_equal(jax.jit(lambda x: jnp.sum(x, axis=0))(sharded), rows.sum(axis=0))
