"""Groups that are released one after the other, on eight devices: the same numbers as optax by hand on one."""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

import trainkit as tk
from trainkit.callbacks import Finetune

X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
STRATEGIES = {
    "jit": lambda: "jit",
    "vmap": lambda: "vmap",
    "pmap": lambda: "pmap",
    "fsdp": lambda: tk.parallel.Mesh(fsdp=8),
    "tensor": lambda: tk.parallel.Mesh(data=4, tensor=2, rules=[("enc/kernel", (None, "tensor"))]),
}
TX = optax.adamw(lambda count: 0.1 * 0.8**count, weight_decay=0.1)


class Net(nn.Module):
    boxed: bool = False

    @nn.compact
    def __call__(self, x):
        start = nn.initializers.lecun_normal()
        if self.boxed:
            start = nn.with_partitioning(start, (None, "fsdp"))
        x = nn.tanh(nn.Dense(8, name="enc", kernel_init=start)(x))
        return nn.Dense(1, name="head")(x)[..., 0]


class Regression(tk.Trainer):
    def loss(self, model, batch, ctx):
        return (model(batch["x"]) - 1) ** 2, {}


def by_hand(params, release, steps):
    def loss(params):
        return ((Net().apply({"params": params}, X) - 1) ** 2).mean()

    states = {}
    for step in range(steps):
        grads = jax.grad(loss)(params)
        for name in ["head"] + ["enc"] * (step >= release):
            states.setdefault(name, TX.init(params[name]))
            updates, states[name] = TX.update(grads[name], states[name], params[name])
            params = {**params, name: optax.apply_updates(params[name], updates)}
    return params


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *[(kind, {}) for kind in STRATEGIES],
        ("jit", {"accumulate": 2}),
        ("pmap", {"accumulate": 2}),
        ("fsdp", {"steps_per_call": 3}),
        ("fsdp", {"boxed": True}),
    ],
    ids=str,
)
def test_every_strategy_releases_groups(kind, options):
    boxed = options.pop("boxed", False)
    trainer = Regression(
        Net(boxed),
        TX,
        callbacks=[Finetune({"enc": tk.At(steps=(2,))})],
        strategy=STRATEGIES[kind](),
        **options,
    )
    batch = {"x": X}
    start = jax.device_get(nn.meta.unbox(trainer.init(batch).params))
    data = tk.data.Arrays(batch, batch_size=16 // options.get("accumulate", 1))
    for steps in (2, 4):
        state = trainer.fit(data, steps=2).state
        found = nn.meta.unbox(state.params)
        expected = by_hand(start, 2, steps)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)
        same = np.array_equal(found["enc"]["kernel"], start["enc"]["kernel"])
        assert same == (steps == 2)
    if kind == "fsdp":
        mu = nn.meta.unbox(state.opt_state.groups["enc"][0].mu["enc"]["kernel"])
        assert mu.addressable_shards[0].data.size * 8 == mu.size
