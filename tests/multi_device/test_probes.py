"""What probes say under every strategy on eight devices: what Flax and NumPy say of the whole batch."""

import jax
import numpy as np
import optax
import pytest

import trainkit as tk
from tests.helpers.by_hand import start
from tests.helpers.digits import Net, NetTrainer, batches

EACH = tk.Every(steps=1)
STRATEGIES = {
    "data=8": tk.parallel.Mesh,
    "fsdp=8": lambda: tk.parallel.Mesh(fsdp=8),
    "PerExample": tk.parallel.PerExample,
    "Pmap": tk.parallel.Pmap,
}
NET = Net(norm=False, rate=0.0)
# The last batch is padded, so that some replicas have no row of it.
DATA = [*batches(1), {name: leaf[:5] for name, leaf in batches(1, seed=1)[0].items()}]


def made(strategy, *callbacks):
    return NetTrainer(NET, optax.sgd(0.1), strategy=STRATEGIES[strategy](), callbacks=callbacks)


def gradient(params, batch):
    def loss(params):
        logits = NET.apply({"params": params}, batch["x"], train=False)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    return jax.device_get(jax.grad(loss)(params))


def square(tree):
    return sum((np.asarray(leaf, np.float64) ** 2).sum() for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def by_hand():
    """For each step: parameters before, gradient, and the batch."""
    params, steps = start(NET, optax.sgd(0.1), DATA[0]).params, []
    for batch in DATA:
        grads = gradient(params, batch)
        steps.append((jax.device_get(params), grads, batch))
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    return steps


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_norms_rows_and_activations(strategy, by_hand):
    def rows(values):
        x, mask = values.batch["x"], values.mask
        return {"sum": jax.numpy.where(mask[:, None], x, 0).sum(), "real": mask.sum()}

    callbacks = [
        tk.callbacks.Watch(EACH),
        tk.callbacks.ActivationStats(EACH),
        tk.callbacks.Probe(rows, every=EACH),
    ]
    history = made(strategy, *callbacks).fit(DATA, epochs=1).history
    for step, (params, grads, batch) in enumerate(by_hand, 1):
        hidden = batch["x"] @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
        expected = {
            "watch/grads/norm": np.sqrt(square(grads)),
            "watch/params/norm/Dense_1": np.sqrt(square(params["Dense_1"])),
            "watch/updates/norm": 0.1 * np.sqrt(square(grads)),
            "watch/update_ratio": 0.1 * np.sqrt(square(grads) / square(params)),
            "activations/Dense_0/dead": (np.maximum(hidden, 0) == 0).all(axis=0).mean(),
            "activations/Dense_0/saturated": (np.abs(np.tanh(hidden)) > 0.99).mean(),
            "activations/Dense_0/mean": hidden.mean(),
            "activations/Dense_0/std": hidden.std(),
            "rows/sum": batch["x"].sum(),
            "rows/real": len(batch["y"]),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(dict(history[name])[step], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_noise_scale_of_the_first_step(strategy, by_hand):
    params, grads, batch = by_hand[0]
    first = np.arange(16) < 8
    halves = [
        gradient(params, {name: leaf[half] for name, leaf in batch.items()}) for half in (first, ~first)
    ]
    small, large = np.mean([square(half) for half in halves]), square(grads)
    noise = (small - large) / (1 / 8 - 1 / 16)
    history = made(strategy, tk.callbacks.GradientNoiseScale(EACH)).fit(DATA[:1], epochs=1).history
    np.testing.assert_allclose(
        dict(history["gradient_noise_scale"])[1], noise / (large - noise / 16), rtol=1e-3
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_spike_is_refused_by_all(strategy, by_hand):
    spoilt = {"x": 100 * DATA[0]["x"], "y": DATA[0]["y"]}
    guard = tk.callbacks.SpikeGuard(5.0, 1, "grad_norm", every=EACH)
    result = made(strategy, guard).fit([DATA[0], spoilt], epochs=1)
    assert result.history["spikes/refused"] == [(1, 0), (2, 1)]
    for found, expected in zip(
        jax.tree.leaves(result.state.params), jax.tree.leaves(by_hand[1][0]), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
