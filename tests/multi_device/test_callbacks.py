"""Every callback under layouts of eight devices: the run and what is logged are those of one device, to rounding."""

import jax
import numpy as np
import optax
import pytest

import trainkit as tk
from tests.callbacks.registry import REGISTRY
from trainkit.testing._classifier import Net, NetTrainer, examples

LAYOUTS = {
    "mesh": lambda: tk.parallel.Mesh(data=2, fsdp=4),
    "pmap": lambda: tk.parallel.Pmap(),
}
# What depends on the machine: times, and bytes of devices.
UNSTEADY = ("throughput/", "time/", "memory/")


def fit(name, strategy):
    tx = optax.inject_hyperparams(optax.adam)(learning_rate=0.01)
    trainer = NetTrainer(Net(norm=False), tx, callbacks=[REGISTRY[name]()], strategy=strategy)
    data = [examples(16, seed) for seed in range(3)]
    result = trainer.fit(data, epochs=2, eval_data=[*data[:1], examples(5, seed=7)])
    history = {
        key: np.asarray(pairs, np.float64)
        for key, pairs in result.history.items()
        if not key.startswith(UNSTEADY)
    }
    return jax.device_get(result.state.params), history


@pytest.mark.parametrize("name", REGISTRY)
def test_a_callback_does_the_same_on_eight_devices(name):
    params, history = fit(name, tk.parallel.Mesh(devices=jax.devices()[:1]))
    for layout, make in LAYOUTS.items():
        found, logged = fit(name, make())
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6, err_msg=layout)
        assert logged.keys() == history.keys(), layout
        for key, pairs in history.items():
            np.testing.assert_allclose(logged[key], pairs, rtol=1e-3, atol=1e-5, err_msg=f"{layout}: {key}")
