"""Key streams of a module: those of `apply(rngs={name: key for every stream it asks for})`, without being named."""

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainkit as tk
from tests.helpers.compare import assert_same
from trainkit._models.linen import LinenModel
from trainkit._models.precision import Precision

X = np.random.default_rng(0).normal(size=(4, 6, 3)).astype(np.float32)
TX = optax.sgd(0.5)


class Masks(nn.Module):
    """Several masks of one input."""

    @nn.compact
    def __call__(self, x):
        masks = nn.vmap(
            nn.Dropout,
            variable_axes={"params": None},
            in_axes=None,
            out_axes=-1,
            axis_size=5,
            split_rngs={"params": False, "dropout": True},
        )
        h = masks(0.5, deterministic=False)(nn.Dense(2)(x))
        return (h * self.param("w", nn.initializers.normal(), (1, 1, 1, 5))).sum(-1)


class Cell(nn.RNNCellBase):
    """A recurrent cell whose state is dropped out anew at every position."""

    @nn.compact
    def __call__(self, carry, x):
        h = nn.tanh(nn.Dense(2)(jnp.concatenate([carry, x], axis=-1)))
        h = nn.Dropout(0.5, deterministic=False)(h)
        return h, h

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        return jnp.zeros((*input_shape[:-1], 2))

    @property
    def num_feature_axes(self):
        return 1


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(Cell(), split_rngs={"params": False, "dropout": True})(x)


class Noisy(nn.Module):
    """One layer of a scan, with noise from a stream of its own."""

    @nn.compact
    def __call__(self, h, _):
        return nn.Dense(3)(h) + jax.random.normal(self.make_rng("noise"), h.shape), None


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            Noisy, variable_axes={"params": 0}, split_rngs={"params": True, "noise": True}, length=3
        )
        return layers()(x, None)[0]


class Streams(nn.Module):
    """Two streams drawn in one scope, in turns, and the one without a name."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3)(x)
        for stream in ("left", "right", "left"):
            x = x + jax.random.normal(self.make_rng(stream), x.shape)
        return x + jax.random.uniform(self.make_rng(), x.shape)


CASES = {
    "vmap": (Masks(), ["dropout"]),
    "rnn": (Recurrent(), ["dropout"]),
    "scan": (Deep(), ["noise"]),
    "own": (Streams(), ["left", "right", "params"]),
}


class MeanTrainer(tk.Trainer):
    """The loss is the mean square of what the model returns, per example; also what is predicted."""

    def loss(self, model, batch, ctx):
        y = model(batch["x"])
        return (y**2).reshape(len(y), -1).mean(-1), {"y": y}

    def predict_step(self, model, batch, ctx):
        return model(batch["x"])


def by_hand(module, names, params, x, key):
    """The mean loss of a batch, as `apply` with every stream named gives it."""
    return (module.apply({"params": params}, x, rngs=dict.fromkeys(names, key)) ** 2).mean()


@pytest.mark.parametrize(
    ("case", "remat"), [("vmap", False), ("rnn", False), ("scan", False), ("own", False), ("rnn", True)]
)
def test_training_draws_what_apply_draws_with_every_stream_named(case, remat):
    module, names = CASES[case]
    trainer = MeanTrainer(module, TX, remat=remat)
    state = jax.device_get(trainer.init({"x": X}))
    grad = jax.jit(jax.grad(lambda params, key: by_hand(module, names, params, X, key)))
    params = state.params
    for step in range(2):
        grads = grad(params, jax.random.fold_in(state.rng, step))
        params = jax.tree.map(lambda one, by: one - 0.5 * by, params, grads)
    result = trainer.fit([{"x": X}], steps=2)
    assert_same(result.state.params, params, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_parameters_start_as_those_of_init_with_one_key(case):
    module, names = CASES[case]
    trainer = MeanTrainer(module, TX, seed=3)
    init_key = jax.random.split(jax.random.key(3))[0]
    expected = jax.jit(lambda key: module.init(dict.fromkeys(["params", *names], key), X))(init_key)
    assert_same(trainer.init({"x": X}).params, expected["params"])


@pytest.mark.parametrize("case", CASES)
def test_prediction_draws_what_apply_draws(case):
    module, names = CASES[case]
    trainer = MeanTrainer(module, TX)
    state = trainer.init({"x": X})
    keys = dict.fromkeys(names, jax.random.fold_in(state.rng, 0))
    expected = jax.jit(lambda params: module.apply({"params": params}, X, rngs=keys))(state.params)
    assert_same(trainer.predict([{"x": X}]), np.asarray(expected), rtol=1e-6, atol=1e-6)
    losses = (np.asarray(expected, np.float64) ** 2).reshape(4, -1).mean(-1)
    assert trainer.evaluate([{"x": X}])["loss"] == pytest.approx(losses.mean(), rel=1e-5)


@pytest.mark.parametrize("case", ["rnn", "own"])
def test_each_example_of_vmap_draws_from_its_own_key(case):
    module, names = CASES[case]

    class One(MeanTrainer):
        def loss(self, model, batch, ctx):
            return (model(batch["x"]) ** 2).mean(), {}

    one_device = tk.parallel.PerExample(devices=jax.local_devices()[:1])
    trainer = One(module, TX, strategy=one_device)
    state = jax.device_get(trainer.init({"x": X}))

    def mean(params, key):
        rows = jax.vmap(lambda x, k: by_hand(module, names, params, x, k))
        return rows(X, jax.random.split(key, len(X))).mean()

    grads = jax.jit(jax.grad(mean))(state.params, jax.random.fold_in(state.rng, 0))
    params = jax.tree.map(lambda one, by: one - 0.5 * by, state.params, grads)
    assert_same(trainer.fit([{"x": X}], steps=1).state.params, params, rtol=1e-5, atol=1e-6)


def test_micro_batches_draw_from_keys_of_their_own():
    module, names = CASES["scan"]
    trainer = MeanTrainer(module, TX, accumulate=2)
    state = jax.device_get(trainer.init({"x": X}))

    def mean(params):
        key = jax.random.fold_in(state.rng, 0)
        halves = [
            by_hand(module, names, params, X[2 * i : 2 * i + 2], jax.random.fold_in(key, i)) for i in (0, 1)
        ]
        return sum(halves) / 2

    grads = jax.jit(jax.grad(mean))(state.params)
    params = jax.tree.map(lambda one, by: one - 0.5 * by, state.params, grads)
    result = trainer.fit([{"x": X[:2]}, {"x": X[2:]}], steps=1)
    assert_same(result.state.params, params, rtol=1e-5, atol=1e-6)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.Dropout(0.5, deterministic=False)(nn.Dense(3)(x))
        return x


def test_plain_dropout_keeps_the_numbers_of_a_single_key():
    module, key = Plain(), jax.random.key(1)
    model = LinenModel(module, Precision())
    variables = model.init(lambda bound, x: bound(x), key, X)
    assert_same(variables, module.init(key, X))
    got, _ = model.apply(lambda bound, x: bound(x), variables, key, X, train=True)
    assert_same(got, module.apply(variables, X, rngs=key))


class DrawsFirst(nn.Module):
    """Noise before a parameter, in one scope."""

    @nn.compact
    def __call__(self, x):
        noise = jax.random.normal(self.make_rng("noise"), x.shape)
        return (x + noise) * self.param("w", nn.initializers.normal(), (1, 1, 3))


def test_a_stream_drawn_before_a_parameter_does_not_move_it():
    key = jax.random.key(1)
    got = LinenModel(DrawsFirst(), Precision()).init(lambda bound, x: bound(x), key, X)
    assert_same(got, DrawsFirst().init(key, X))


class Asks(nn.Module):
    """Noise where there is a stream for it; dropout by its absence."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.5, deterministic=not self.has_rng("dropout"))(x)
        if self.has_rng("noise"):
            x = x * self.param("w", nn.initializers.ones, ()) + jax.random.normal(
                self.make_rng("noise"), x.shape
            )
        return x


def test_a_module_that_asks_finds_its_streams_in_training_and_not_in_evaluation():
    trainer = MeanTrainer(Asks(), TX)
    state = jax.device_get(trainer.init({"x": X}))
    assert list(state.params) == ["w"]
    key = jax.random.fold_in(state.rng, 0)
    grads = jax.jit(jax.grad(lambda p: by_hand(Asks(), ["dropout", "noise"], p, X, key)))(state.params)
    result = trainer.fit([{"x": X}], steps=1)
    assert_same(result.state.params, {"w": state.params["w"] - 0.5 * grads["w"]}, rtol=1e-5, atol=1e-6)
    assert_same(trainer.predict([{"x": X}]), X)


def test_a_stream_that_a_lifted_transformation_holds_back_is_named():
    class Held(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.vmap(nn.Dropout, in_axes=0, split_rngs={"params": True})(0.5, deterministic=False)(x)

    model = LinenModel(Held(), Precision())
    with pytest.raises(flax.errors.InvalidRngError) as caught:
        model.apply(lambda bound, x: bound(x), {"params": {}}, jax.random.key(0), X, train=True)
    assert "split_rngs={'dropout': True}" in "".join(caught.value.__notes__)


def test_flax_is_as_it_was_outside_of_a_run():
    methods = [nn.Module.make_rng, nn.Module.has_rng, nn.Module.sow, nn.Module.perturb]
    model = LinenModel(Plain(), Precision())
    seen = []

    def look(bound, x):
        seen.append(nn.Module.sow)
        return bound(x)

    model.init(look, jax.random.key(0), X)
    assert seen[0] is not methods[2]
    assert [nn.Module.make_rng, nn.Module.has_rng, nn.Module.sow, nn.Module.perturb] == methods
