"""Batch statistics of one batch alone, whatever a layer is wrapped in, against NumPy."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from trainkit._models.linen import LinenModel
from trainkit._models.precision import resolve_precision

X = np.random.default_rng(0).normal(2, 3, (6, 4)).astype(np.float32)
Y = np.random.default_rng(1).normal(-1, 1, (6, 4)).astype(np.float32)


def norm(**options):
    return nn.BatchNorm(use_running_average=False, **options)


def measured(module, fn=lambda model, *args: model(*args), *args):
    """The collection that one training call leaves, and the layers found."""
    args = args or (X,)
    model, found = LinenModel(module, resolve_precision("float32")).measuring()
    variables = model.init(fn, jax.random.key(0), *args)
    run = jax.jit(lambda variables: model.apply(fn, variables, jax.random.key(1), *args, train=True)[1])
    run(variables)
    return run(variables)["batch_stats"], found


def assert_statistics(layer, *seen):
    rows = np.concatenate([one.reshape(-1, one.shape[-1]) for one in seen]).astype(np.float64)
    np.testing.assert_allclose(layer["mean"], rows.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer["var"], rows.var(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.99, 0.5, 0.0])
def test_a_layer_alone(momentum):
    stats, found = measured(norm(momentum=momentum))
    assert_statistics(stats, X)
    assert found == {()}


class Twice(nn.Module):
    def setup(self):
        self.layer = norm()

    def __call__(self, x, y):
        return self.layer(x), self.layer(y)


def test_a_layer_called_twice_has_what_both_calls_saw():
    stats, found = measured(Twice(), lambda model, x, y: model(x, y), X, Y)
    assert_statistics(stats["layer"], X, Y)
    assert found == {("layer",)}


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x):
        return norm()(nn.Dropout(0.5)(x, deterministic=False))


def test_nothing_is_dropped():
    assert_statistics(measured(Dropped())[0]["BatchNorm_0"], X)


class Attention(nn.Module):
    in_call: bool

    @nn.compact
    def __call__(self, x):
        options = {} if self.in_call else {"deterministic": False}
        layer = nn.MultiHeadDotProductAttention(2, dropout_rate=0.5, name="layer", **options)
        return norm()(layer(x, **({"deterministic": False} if self.in_call else {})))


@pytest.mark.parametrize("in_call", [True, False])
def test_nothing_is_dropped_of_attention(in_call):
    x, module = np.stack([X, Y]), Attention(in_call)
    params = module.init({"params": jax.random.key(0), "dropout": jax.random.key(0)}, x)["params"]
    layer = nn.MultiHeadDotProductAttention(2, deterministic=True)
    seen = layer.apply({"params": params["layer"]}, x)
    model, _ = LinenModel(module, resolve_precision("float32")).measuring()
    stats = {"BatchNorm_0": {"mean": np.zeros(4, np.float32), "var": np.ones(4, np.float32)}}
    variables = {"params": params, "batch_stats": stats}
    updated = model.apply(lambda model, x: model(x), variables, jax.random.key(1), x, train=True)[1]
    assert_statistics(updated["batch_stats"]["BatchNorm_0"], np.asarray(seen))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return 2 * norm()(x) + 1, None


def _lifted(kind):
    options = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
    if kind == "scan":
        return nn.scan(Layer, length=2, **options)()
    return nn.vmap(Layer, in_axes=0, **options)()


def test_layers_in_a_scan():
    stats, _ = measured(_lifted("scan"), lambda model, x: model(x, None))
    layers = stats["BatchNorm_0"]
    first = {key: value[0] for key, value in layers.items()}
    assert_statistics(first, X)
    seen = 2 * (X - X.mean(0)) / np.sqrt(X.var(0) + 1e-5) + 1
    assert_statistics({key: value[1] for key, value in layers.items()}, seen)


def test_layers_side_by_side():
    stats, _ = measured(_lifted("vmap"), lambda model, x: model(x), np.stack([X, Y]))
    for index, seen in enumerate((X, Y)):
        assert_statistics({key: value[index] for key, value in stats["BatchNorm_0"].items()}, seen)


class Wrapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        x, _ = nn.jit(nn.remat(Layer))()(x)
        side_by_side = nn.vmap(
            nn.BatchNorm, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}
        )
        return side_by_side(use_running_average=False)(np.stack([X, Y])), x


def test_a_layer_that_is_lifted_itself():
    stats, found = measured(Wrapped())
    (name,) = [name for name in stats if "BatchNorm" in name]
    for index, seen in enumerate((X, Y)):
        assert_statistics({key: value[index] for key, value in stats[name].items()}, seen)
    (other,) = [name for name in stats if "BatchNorm" not in name]
    assert_statistics(stats[other]["BatchNorm_0"], X)
    assert found == {(name,), (other, "BatchNorm_0")}


class Mixed(nn.Module):
    @nn.compact
    def __call__(self, x):
        frozen = nn.BatchNorm(use_running_average=True, name="frozen")(x)
        still = norm(momentum=1.0, name="still")(x)
        count = self.variable("batch_stats", "count", lambda: 0.0)
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            count.value += 1.0
        return frozen + still + norm(name="norm")(x)


def test_what_takes_no_statistics_of_the_batch_is_left_alone():
    stats, found = measured(Mixed())
    assert found == {("norm",)}
    assert_statistics(stats["norm"], X)
    np.testing.assert_array_equal(stats["frozen"]["mean"], np.zeros(4))
    np.testing.assert_array_equal(stats["still"]["var"], np.ones(4))
    assert stats["count"] == 1
