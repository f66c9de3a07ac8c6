"""Frozen arrays and hyperparameters on eight devices: the same numbers as on one, divided where parameters are."""

import flax.linen as nn
import numpy as np
import optax
import pytest

import trainkit as tk
from tests.helpers.compilations import count_compilations

X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
KERNELS = [np.random.default_rng(seed).normal(size=(8, 4)).astype(np.float32) for seed in range(2)]
RATE, ALPHA = 0.1, 0.5
STRATEGIES = {
    "jit": lambda: "jit",
    "vmap": lambda: "vmap",
    "pmap": lambda: "pmap",
    "fsdp": lambda: tk.parallel.Mesh(fsdp=8),
    "tensor": lambda: tk.parallel.Mesh(data=4, tensor=2, rules=[("kernel", (None, "tensor"))]),
}


class Student(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.zeros, (8, 4))


class Distil(tk.Trainer):
    def loss(self, model, batch, ctx):
        target = batch["x"] @ ctx.frozen["teacher"]["kernel"]
        return ctx.hparams["alpha"] * 0.5 * ((model(batch["x"]) - target) ** 2).sum(-1), {"target": target}


def by_hand(start, target, steps):
    kernel = np.asarray(start, np.float64)
    for _ in range(steps):
        kernel = kernel - RATE * ALPHA * X.T @ (X @ (kernel - target)) / len(X)
    return kernel


@pytest.mark.parametrize("kind", STRATEGIES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_strategy_takes_them(kind, accumulate):
    trainer = Distil(
        Student(),
        optax.sgd(RATE),
        strategy=STRATEGIES[kind](),
        accumulate=accumulate,
        frozen={"teacher": {"kernel": KERNELS[0]}},
        hparams={"alpha": ALPHA},
    )
    data = tk.data.Arrays({"x": X}, batch_size=16 // accumulate)

    def go():
        result = trainer.fit(data, steps=2)
        loss, target = trainer.evaluate(data)["loss"], trainer.predict(data)["target"]
        read = trainer.apply(lambda model, ctx: ctx.frozen["teacher"]["kernel"] * ctx.hparams["alpha"])
        return result.state.params["kernel"], loss, target, read

    kernel = np.zeros((8, 4))
    for teacher in KERNELS:
        trainer.frozen = {"teacher": {"kernel": teacher}}
        params, loss, target, read = go()
        kernel = by_hand(kernel, teacher, 2)
        np.testing.assert_allclose(params, kernel, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            loss, ALPHA * 0.5 * ((X @ (kernel - teacher)) ** 2).sum(-1).mean(), rtol=1e-4
        )
        np.testing.assert_allclose(target, X @ teacher, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(read, teacher * ALPHA, rtol=1e-6)
    divided = {"fsdp": 8, "tensor": 2}.get(kind, 1)
    shard = trainer.frozen["teacher"]["kernel"].addressable_shards[0].data
    assert shard.size * divided == KERNELS[0].size
    trainer.frozen = {"teacher": {"kernel": KERNELS[0]}}
    with count_compilations() as count:
        trainer.fit(data, steps=2)
    assert count() == 0
