"""Modules of `flax.nnx`: every number is that of a loop written as its guides do, with the same seeding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import trainkit as tk
from trainkit._models.nnx import NnxModel
from trainkit._models.precision import resolve_precision

STEPS = 20


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(6, 16, rngs=rngs), nnx.Linear(16, 3, rngs=rngs)])

    def __call__(self, x):
        return self.layers[1](nnx.tanh(self.layers[0](x)))


class Cnn(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)
        self.noise = nnx.Dropout(0.2, rng_collection="noise", rngs=rngs)
        self.out = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = self.drop(nnx.relu(self.norm(self.conv(x.reshape(-1, 2, 3, 1)))))
        return self.out(self.noise(x.mean((1, 2))))


class Transformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Linear(1, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, dropout_rate=0.1, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.out = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        h = self.embed(x[..., None])
        return self.out(self.norm(h + self.attention(h)).mean(1))


class Lstm(nnx.Module):
    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(1, 8, rngs=rngs), rngs=rngs)
        self.out = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.rnn(x[..., None])[:, -1])


MODELS = {"mlp": Mlp, "cnn": Cnn, "transformer": Transformer, "lstm": Lstm}


class Classifier(tk.Trainer):
    def loss(self, model, batch, ctx):
        logits = model(batch["x"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return losses, {"logits": logits, "labels": batch["y"]}


def batches(count=4, rows=8):
    rng = np.random.default_rng(0)
    return [
        {
            "x": rng.normal(size=(rows, 6)).astype(np.float32),
            "y": rng.integers(0, 3, rows).astype(np.int32),
        }
        for _ in range(count)
    ]


def reseed(module, key):
    """Gives every stream count 0 and a key of its own, as DESIGN says."""
    streams = [one for _, one in nnx.iter_graph(module) if isinstance(one, nnx.RngStream)]
    paths = {id(one): path for path, one in nnx.iter_graph(module)}
    for index, stream in enumerate(sorted(streams, key=lambda one: tuple(map(str, paths[id(one)])))):
        stream.key.set_value(jax.random.fold_in(key, index))
        stream.count.set_value(jnp.zeros((), jnp.uint32))


def by_hand(make, tx, data, steps=STEPS, seed=0):
    """Trains as the guides of NNX do; returns the module and the losses."""
    init_key, step_key = jax.random.split(jax.random.key(seed))
    model = make(nnx.Rngs(init_key))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def loss_fn(model, batch):
        return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"]).mean()

    @nnx.jit
    def step(model, optimizer, batch):
        loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
        optimizer.update(model, grads)
        return loss

    losses = []
    for number in range(steps):
        model.train()
        reseed(model, jax.random.fold_in(step_key, number))
        losses.append(float(step(model, optimizer, data[number % len(data)])))
    return model, losses


def pure(module, kind):
    return nnx.to_pure_dict(nnx.state(module, kind))


def close(actual, expected, rtol=2e-5, atol=2e-6):
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in pairs:
        np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)


def fit(make, steps=STEPS, tx=None, **options):
    log = tk.callbacks.LogMetrics(every=tk.Every(steps=1))
    callbacks = [log, *options.pop("callbacks", ())]
    trainer = Classifier(make, tx or optax.adam(1e-2), callbacks=callbacks, **options)
    return trainer, trainer.fit(batches(), steps=steps)


@functools.cache
def expected(name):
    return by_hand(MODELS[name], optax.adam(1e-2), batches())


@pytest.mark.parametrize("name", MODELS)
def test_a_run_equals_the_loop_of_the_guides(name):
    module, losses = expected(name)
    trainer, result = fit(MODELS[name])
    close(result.state.params, pure(module, nnx.Param))
    close(dict(result.state.batch_stats), pure(module, nnx.BatchStat))
    close([value for _, value in result.history["train/loss"]], losses)
    module.eval()
    x = batches(1)[0]["x"]
    close(trainer.predict([{"x": x, "y": batches(1)[0]["y"]}])["logits"], module(x))


@pytest.mark.parametrize("strategy", ["pmap", "vmap"])
def test_other_strategies_are_the_same_where_nothing_is_drawn(strategy):
    module, _ = expected("mlp")
    result = fit(Mlp, strategy=strategy)[1]
    close(result.state.params, pure(module, nnx.Param), rtol=1e-4, atol=1e-5)


def test_accumulated_and_rematerialised():
    module, _ = by_hand(Mlp, optax.adam(1e-2), batches(1, rows=16), steps=10)
    halves = [jax.tree.map(lambda leaf, at=at: leaf[at : at + 8], batches(1, rows=16)[0]) for at in (0, 8)]
    trainer = Classifier(Mlp, optax.adam(1e-2), accumulate=2, remat=True)
    close(trainer.fit(halves, steps=10).state.params, pure(module, nnx.Param))


def test_an_object_is_the_start_and_is_never_written():
    module = Cnn(nnx.Rngs(3))
    before = jax.device_get(nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState))))
    one = Classifier(module, optax.sgd(0.0), seed=1)
    state = one.fit(batches(), steps=3).state
    close(state.params, pure(module, nnx.Param), rtol=0, atol=0)
    close(jax.device_get(nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState)))), before, rtol=0, atol=0)
    again = Classifier(module, optax.adam(1e-2), seed=2)
    again.fit(batches(), steps=3)
    again.reset()
    again.init(batches()[0])
    close(again.state.params, pure(module, nnx.Param), rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_computes_in_it_and_keeps_float32(precision):
    seen = {}

    class Looks(nnx.Module):
        def __init__(self, rngs):
            self.lin = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            seen["kernel"], seen["x"] = self.lin.kernel.get_value().dtype, x.dtype
            y = self.lin(x)
            seen["y"] = y.dtype
            return y

    class Reads(Classifier):
        def loss(self, model, batch, ctx):
            losses, outputs = super().loss(model, batch, ctx)
            seen["params"], seen["losses"] = ctx.params["lin"]["kernel"].dtype, losses.dtype
            return losses, outputs

    result = Reads(Looks, optax.sgd(0.1), precision=precision).fit(batches(), steps=4)
    half = jnp.dtype(precision)
    assert seen == {"kernel": half, "x": half, "y": half, "params": jnp.float32, "losses": jnp.float32}
    assert {leaf.dtype for leaf in jax.tree.leaves(result.state.params)} == {jnp.dtype("float32")}


def test_a_module_called_while_another_is_casts_for_itself():
    seen, key = [], jax.random.key(0)

    class Nested(nnx.Module):
        def __init__(self, rngs):
            self.w = nnx.Param(jnp.ones(()))

        def __call__(self, x):
            seen.append(x.dtype)
            if len(seen) == 1:
                call()
            return x * self.w

    model = NnxModel(Nested, resolve_precision("bfloat16"))
    variables = model.init(lambda module: None, key)

    def call():
        return model.apply(lambda module: module(jnp.ones(3)), variables, key, train=True)[0]

    assert call().dtype == jnp.float32
    assert seen == [jnp.bfloat16, jnp.bfloat16]


class Counter(nnx.Variable):
    pass


class Everything(nnx.Module):
    """Tied weights, a counter, a cache, sown values, modules in dicts, and a draw from three streams."""

    def __init__(self, rngs):
        self.first = nnx.Linear(6, 6, rngs=rngs)
        self.parts = nnx.Dict({"a": nnx.Linear(6, 3, rngs=rngs), "b": self.first})
        self.count = Counter(jnp.zeros((), jnp.int32))
        self.rngs = rngs.fork() if hasattr(rngs, "fork") else rngs

    def __call__(self, x):
        self.count.set_value(self.count.get_value() + 1)
        self.sow(nnx.Intermediate, "seen", x)
        x = self.parts["b"](self.first(x))
        noise = jax.random.normal(self.rngs.noise(), x.shape) + jax.random.normal(self.rngs.other(), x.shape)
        return self.parts["a"](x + 0.01 * noise)


@pytest.mark.filterwarnings("ignore:.*sow")
def test_shared_counted_sown_and_drawn():
    make = lambda rngs: Everything(nnx.Rngs(rngs.params(), noise=1, other=2))  # noqa: E731
    trainer, result = fit(make, steps=5)
    state = result.state
    assert sorted(state.params) == ["first", "parts"]
    assert sorted(state.params["parts"]) == ["a"]
    assert {name: jax.device_get(value) for name, value in state.collections.items()} == {
        "Counter": {"count": 5}
    }
    trainer.evaluate(batches())
    assert int(trainer.state.collections["Counter"]["count"]) == 5
    # The first layer is used twice, under two names, and is one.
    module = trainer.module("live")
    assert module.parts["b"] is module.first


def test_streams_differ_between_layers_streams_and_steps():
    masks = []

    class Draws(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rng_collection="other", rngs=rngs)
            self.w = nnx.Param(jnp.ones(()))

        def __call__(self, x):
            return jnp.stack([self.a(x), self.b(x)]) * self.w

    class Collects(tk.Trainer):
        def loss(self, model, batch, ctx):
            drawn = model(jnp.ones((8, 6)))
            return (drawn.sum((0, 2)) * 0), {"drawn": drawn}

    look = tk.callbacks.Lambda(on_step=lambda info: masks.append(np.asarray(info.apply(draw, rng=info.step))))

    def draw(model):
        model.train()
        return model(jnp.ones((8, 6)))

    Collects(lambda rngs: Draws(nnx.Rngs(rngs.params(), other=3)), optax.sgd(0.0), callbacks=[look]).fit(
        batches(2), steps=2
    )
    flat = [one.tobytes() for mask in masks for one in mask]
    assert len(set(flat)) == 4


def test_a_run_resumes_bit_for_bit_and_its_weights_are_saved(tmp_path):
    def make(*more):
        keep = tk.callbacks.Checkpoint(tk.Every(steps=3))
        return Classifier(
            Cnn, optax.adam(1e-2), logdir=tmp_path / "run", callbacks=[tk.callbacks.EMA(0.9), *more, keep]
        )

    whole = Classifier(Cnn, optax.adam(1e-2), callbacks=[tk.callbacks.EMA(0.9)]).fit(batches(), epochs=2)

    def fail(info):
        raise RuntimeError("here")

    with pytest.raises(RuntimeError, match="here"):
        make(tk.callbacks.Lambda(every=tk.At(steps=(5,)), on_step=fail)).fit(batches(), epochs=2, resume=True)
    result = make().fit(batches(), epochs=2, resume=True)
    for one, other in zip(
        jax.tree.leaves(result.state.variables), jax.tree.leaves(whole.state.variables), strict=True
    ):
        assert np.array_equal(one, other)
    fresh = make()
    fresh.restore(tmp_path / "run")
    close(fresh.state.params, whole.state.params, rtol=0, atol=0)
    tk.save(tmp_path / "w.safetensors", whole.state.params)
    close(tk.load(tmp_path / "w.safetensors"), jax.device_get(whole.state.params), rtol=0, atol=0)


def test_an_exported_module_predicts_the_same(tmp_path):
    trainer, _ = fit(Cnn, steps=3)
    batch = batches(1)[0]
    tk.export.save(tmp_path / "cnn.tk", trainer, batch)
    close(
        tk.export.load(tmp_path / "cnn.tk")(batch)["logits"],
        trainer.predict([batch])["logits"],
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda rngs: 3,
            r"expected a flax\.linen\.Module, a flax\.nnx\.Module, .*got function, which returned int",
        ),
        (nnx.Linear, r"model=Linear: its constructor wants in_features, out_features.*lambda rngs: Linear"),
        (3, r"expected a flax\.linen\.Module.*got int"),
    ],
)
def test_what_is_no_model_is_refused_by_name(model, message):
    with pytest.raises(TypeError, match=message):
        Classifier(model, optax.sgd(0.1))


def test_two_types_of_one_name_are_refused():
    def make(rngs):
        module = Mlp(rngs)
        module.a = Counter(jnp.zeros(()))
        module.b = type("Counter", (nnx.Variable,), {})(jnp.zeros(()))
        return module

    with pytest.raises((TypeError, ValueError), match="Counter"):
        Classifier(make, optax.sgd(0.1)).init(batches(1)[0])


def test_the_first_submodule_that_is_not_finite_is_named(tmp_path):
    class Breaks(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)])

        def __call__(self, x):
            return self.layers[1](jnp.log(self.layers[0](x) * 0 - 1))

    trainer = Classifier(Breaks, optax.sgd(0.1), logdir=tmp_path, callbacks=[tk.callbacks.NanGuard("raise")])
    with pytest.raises(tk.NonFiniteError):
        trainer.fit(batches(), steps=2)
    found = trainer.replay(1)
    assert (found.first_module, found.inputs_finite) == ("Breaks/layers/1 (__call__)", False)


@pytest.mark.parametrize("weights", ["averaged", "live"])
def test_the_trained_module_is_handed_out(weights):
    trainer, result = fit(Cnn, steps=4, callbacks=[tk.callbacks.EMA(0.5)])
    state = tk.callbacks.EMA.view(result.state) if weights == "averaged" else result.state
    module = trainer.module(weights)
    close(pure(module, nnx.Param), jax.device_get(state.params), rtol=0, atol=0)
    x = batches(1)[0]["x"]
    close(module(x), trainer.predict(batches(1), weights=weights)["logits"])
    trainer.fit(batches(), steps=1)  # what was handed out is not taken by later steps
    close(pure(module, nnx.Param), jax.device_get(state.params), rtol=0, atol=0)
