"""`ActivationStats` against NumPy on activations computed by hand with Flax."""

import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainkit as tk
from trainkit.callbacks import ActivationStats

EACH = tk.Every(steps=1)
ROWS = 4


class Gate(nn.Module):
    fn: str

    @nn.compact
    def __call__(self, x):
        return getattr(nn, self.fn)(4 * nn.Dense(40)(x))


class Model(nn.Module):
    """Layers that return what is before relu, after it, after tanh and a sigmoid; a convolution; one called twice."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(64, name="first")(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = Gate("relu", name="relued")(x)
        x = Gate("tanh", name="tanhed")(x)
        x = Gate("sigmoid", name="squeezed")(x)
        x = nn.Conv(5, (3,), name="conv")(x[:, :, None])
        shared = nn.Dense(5, name="shared")
        x = shared(nn.relu(shared(nn.relu(x))))
        return nn.Dense(1, name="head")(x.reshape(len(x), -1))[:, 0]


class Trainer(tk.Trainer):
    def loss(self, model, batch, ctx):
        return (model(batch["x"], ctx.train) - batch["y"]) ** 2, {}


def data(*sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"x": rng.normal(0.7, 1, (rows, 3)).astype(np.float32), "y": np.zeros(rows, np.float32)}
        for rows in sizes
    ]


def outputs_of(trainer, batch, key):
    """Returns what the layers return for a batch, by Flax alone."""
    _, captured = Model().apply(
        {"params": trainer.state.params},
        batch["x"],
        train=True,
        rngs={"dropout": key},
        capture_intermediates=True,
        mutable=["intermediates"],
    )
    found = {}

    def walk(node, path):
        for name, value in node.items():
            if name == "__call__":
                found["/".join(path)] = [np.asarray(one, np.float64) for one in value]
            else:
                walk(value, (*path, name))

    walk(captured["intermediates"], ())
    del found[""]
    return found


def numbers_of(calls):
    everything = np.concatenate([one.reshape(-1) for one in calls])
    dead = np.concatenate([(np.maximum(one, 0) == 0).all(axis=tuple(range(one.ndim - 1))) for one in calls])
    if everything.min() > 0 and everything.max() <= 1:
        near = (everything < 0.01) | (everything > 0.99)
    elif np.abs(everything).max() <= 1:
        near = np.abs(everything) > 0.99
    else:
        near = np.abs(np.tanh(everything)) > 0.99
    return {"dead": dead.mean(), "saturated": near.mean(), "mean": everything.mean(), "std": everything.std()}


def assert_stats(history, step, outputs):
    written = {name.removeprefix("activations/") for name in history if name.startswith("activations/")}
    assert written == {f"{path}/{key}" for path in outputs for key in ("dead", "saturated", "mean", "std")}
    for path, calls in outputs.items():
        for key, value in numbers_of(calls).items():
            found = dict(history[f"activations/{path}/{key}"])[step]
            np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-5, err_msg=f"{path}/{key}")


def initialised(*callbacks, **options):
    trainer = Trainer(Model(), optax.sgd(0.0), callbacks=callbacks, **options)
    trainer.init(data(ROWS)[0])
    return trainer


def test_numbers():
    trainer, (batch,) = initialised(ActivationStats(EACH)), data(ROWS)
    outputs = outputs_of(trainer, batch, jax.random.fold_in(trainer.state.rng, 0))
    stats = {path: numbers_of(calls) for path, calls in outputs.items()}
    assert 0 < stats["relued"]["dead"] < 1
    assert 0 < stats["first"]["dead"] < 1
    for path in ("tanhed", "squeezed", "relued"):
        assert 0 < stats[path]["saturated"] < 1, path
    assert_stats(trainer.fit([batch], epochs=1).history, 1, outputs)


def test_padding_does_not_count():
    trainer, (full, part) = initialised(ActivationStats(tk.At(steps=(2,)))), data(ROWS, 3)
    rows = {"x": np.concatenate([part["x"], part["x"][-1:]]), "y": np.zeros(ROWS, np.float32)}
    outputs = outputs_of(trainer, rows, jax.random.fold_in(trainer.state.rng, 1))
    history = trainer.fit([full, part], epochs=1).history
    assert_stats(history, 2, {path: [one[:3] for one in calls] for path, calls in outputs.items()})


def test_all_batches_of_a_step():
    trainer, (one, other) = initialised(ActivationStats(EACH), accumulate=2), data(ROWS, ROWS)
    key = jax.random.fold_in(trainer.state.rng, 0)
    both = [outputs_of(trainer, batch, jax.random.fold_in(key, i)) for i, batch in enumerate((one, other))]
    joined = {
        path: [np.concatenate(pair) for pair in zip(calls, both[1][path], strict=True)]
        for path, calls in both[0].items()
    }
    assert_stats(trainer.fit([one, other], epochs=1).history, 1, joined)


class Alone(tk.Trainer):
    def loss(self, model, batch, ctx):
        return model(batch["x"])[:, 0], {}


def test_a_model_of_one_layer():
    trainer = Alone(nn.Dense(1), optax.sgd(0.1), callbacks=[ActivationStats(EACH)])
    trainer.init(data(ROWS)[0])
    expected = nn.Dense(1).apply({"params": trainer.state.params}, data(ROWS)[0]["x"])
    history = trainer.fit(data(ROWS), epochs=1).history
    assert_stats(history, 1, {"(root)": [np.asarray(expected, np.float64)]})


def test_mixed_precision():
    trainer = initialised(ActivationStats(EACH), precision="bfloat16")
    outputs = outputs_of(trainer, data(ROWS)[0], jax.random.fold_in(trainer.state.rng, 0))
    history = trainer.fit(data(ROWS), epochs=1).history
    np.testing.assert_allclose(history["activations/head/mean"][0][1], outputs["head"][0].mean(), atol=0.05)


class Own(Trainer):
    def train_step(self, state, batch):
        return super().train_step(state, batch)


class Nothing(nn.Module):
    @nn.compact
    def __call__(self):
        return self.param("w", nn.initializers.zeros, ())


class NoLayers(tk.Trainer):
    def loss(self, model, batch, ctx):
        return model() * batch["x"][:, 0], {}


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"ActivationStats runs the forward pass .* own train_step"):
        Own(Model(), optax.sgd(0.1), callbacks=[ActivationStats()]).fit(data(ROWS), epochs=1)
    with pytest.raises(TypeError, match="every=50"):
        ActivationStats(50)


def test_a_model_without_layers(caplog):
    trainer = NoLayers(Nothing(), optax.sgd(0.1), callbacks=[ActivationStats(EACH)])
    with caplog.at_level(logging.WARNING, "trainkit"):
        trainer.fit(data(ROWS, ROWS, ROWS), epochs=1)
    assert caplog.text.count("ActivationStats writes nothing: no module of the model returns") == 1


def test_the_run_is_as_without():
    batches = data(ROWS, ROWS, ROWS)
    states = []
    for callbacks in ([], [ActivationStats(tk.Every(steps=2))]):
        trainer = Trainer(Model(), optax.sgd(0.1), callbacks=callbacks)
        states.append(jax.device_get(trainer.fit(batches, epochs=1).state.params))
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert all(isinstance(leaf, np.ndarray | jnp.ndarray) for leaf in jax.tree.leaves(states))


class Shifted(Trainer):
    def loss(self, model, batch, ctx):
        return model(ctx.hparams["scale"] * batch["x"] + ctx.frozen["shift"], ctx.train) ** 2, {}


def test_what_the_loss_is_given_besides():
    options = {"hparams": {"scale": 2.0}, "frozen": {"shift": np.float32(1)}}
    trainer = Shifted(Model(), optax.sgd(0.0), callbacks=[ActivationStats(EACH)], **options)
    (batch,) = data(ROWS)
    trainer.init(batch)
    seen = {"x": 2 * batch["x"] + np.float32(1)}
    outputs = outputs_of(trainer, seen, jax.random.fold_in(trainer.state.rng, 0))
    assert_stats(trainer.fit([batch], epochs=1).history, 1, outputs)
