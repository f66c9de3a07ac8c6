"""Modules of `flax.nnx` under layouts of eight devices: the numbers of one device, and parameters where they say."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import trainkit as tk
from tests.models.test_nnx import Classifier, Cnn, Mlp, batches, close, fit

ONE = {"strategy": tk.parallel.Mesh(devices=jax.devices()[:1])}
LAYOUTS = {
    "data": {"data": 8},
    "fsdp": {"data": 2, "fsdp": 4},
    "tensor": {"data": 4, "tensor": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", [Mlp, Cnn])
def test_the_numbers_are_those_of_one_device(make, layout):
    # The bias of a layer before a BatchNorm has a gradient of nothing but rounding, which Adam would blow up.
    tx = optax.sgd(0.1, momentum=0.9)
    expected = fit(make, steps=6, tx=tx, **ONE)[1]
    result = fit(make, steps=6, tx=tx, strategy=tk.parallel.Mesh(**LAYOUTS[layout]))[1]
    close(
        jax.device_get(result.state.variables), jax.device_get(expected.state.variables), rtol=1e-4, atol=1e-5
    )


class Divided(nnx.Module):
    def __init__(self, rngs):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "tensor"))
        back = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("tensor", "embed"))
        self.up = nnx.Linear(6, 16, kernel_init=init, rngs=rngs)
        self.down = nnx.Linear(16, 3, kernel_init=back, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def test_parameters_lie_where_their_metadata_say(caplog):
    _, result = fit(Divided, steps=4, strategy=tk.parallel.Mesh(data=4, tensor=2))
    params, mu = result.state.params, result.state.opt_state[0].mu
    for tree in (params, mu):
        assert tree["up"]["kernel"].sharding.spec == P(None, "tensor")
        assert tree["down"]["kernel"].sharding.shard_shape((16, 3)) == (8, 3)
    assert sum("embed" in record.getMessage() for record in caplog.records) == 1
    expected = fit(Divided, steps=4, **ONE)[1]
    close(jax.device_get(params), jax.device_get(expected.state.params), rtol=1e-4, atol=1e-5)


def test_a_module_is_sharded_from_the_start():
    class Wide(nnx.Module):
        def __init__(self, rngs):
            self.wide = nnx.Linear(6, 1024, rngs=rngs)
            self.out = nnx.Linear(1024, 3, rngs=rngs)

        def __call__(self, x):
            return self.out(self.wide(x))

    trainer = Classifier(Wide, optax.adam(1e-3), strategy=tk.parallel.Mesh(fsdp=8))
    state = trainer.init(batches(1)[0])
    kernel = state.params["wide"]["kernel"]
    assert {shard.data.nbytes for shard in kernel.addressable_shards} == {kernel.nbytes // 8}
    assert np.isfinite(trainer.fit(batches(), steps=2).history["train/loss"][-1][1])
