"""`Throughput` and `Memory` on eight devices: the whole batch, the operations of all of them, their peak together."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainkit as tk
from trainkit.callbacks import Throughput

FEATURES, ROWS = 64, 61


class Wide(tk.Trainer):
    """A dense layer; forward and the gradient of its kernel take 4 operations a weight and row."""

    def loss(self, model, batch, ctx):
        return jnp.square(model(batch["x"])).mean(axis=-1), {}


@pytest.mark.parametrize("strategy", ["jit", "pmap", "vmap"])
def test_rates_are_those_of_all_devices(strategy):
    assert jax.device_count() == 8
    data = tk.data.Arrays(
        {"x": np.ones((ROWS, FEATURES), np.float32), "n": np.arange(ROWS, dtype=np.int32)}, batch_size=40
    )
    throughput = Throughput(tk.Every(epochs=1), items={"n": "n"}, peak_flops=1e9)
    trainer = Wide(nn.Dense(FEATURES), optax.sgd(0.1), strategy=strategy, callbacks=[throughput])
    history = trainer.fit(data, epochs=2).history
    (_, steps), (_, examples), (_, n), (_, flops), (_, mfu) = (
        history[f"throughput/{name}"][-1]
        for name in ("steps_per_second", "examples_per_second", "n_per_second", "flops_per_second", "mfu")
    )
    assert 2 * examples / steps == pytest.approx(ROWS)
    assert 2 * n / steps == pytest.approx(np.arange(ROWS).sum())
    assert flops / steps == pytest.approx(40 * 4 * FEATURES * FEATURES, rel=0.25)
    assert mfu == pytest.approx(flops / 8e9)


def test_a_backend_that_counts_only_what_is_compiled_does_not_compile_it_again(monkeypatch):
    programs, counting = [], []

    def refuse(self):
        counting.append(True)
        raise NotImplementedError

    def note(event, seconds, **_):
        if counting and event == "/jax/core/compile/backend_compile_duration":
            programs.append(seconds)

    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", refuse)
    jax.monitoring.register_event_duration_secs_listener(note)
    throughput = Throughput(tk.Every(steps=2))
    trainer = Wide(nn.Dense(FEATURES), optax.sgd(0.1), callbacks=[throughput], steps_per_call=1)
    try:
        history = trainer.fit([{"x": np.ones((40, FEATURES), np.float32)}] * 4, steps=2).history
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    rates = {name: history.last(f"throughput/{name}_per_second") for name in ("steps", "flops")}
    assert rates["flops"] / rates["steps"] == pytest.approx(40 * 4 * FEATURES * FEATURES, rel=0.35)
    assert counting
    assert not programs
