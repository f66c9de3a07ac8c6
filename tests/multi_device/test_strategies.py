"""Every strategy equals a loop written by hand for one device; a new strategy joins with one line in `STRATEGIES`."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainkit as tk
from tests.helpers.compare import assert_same
from tests.helpers.digits import CLASSES, Net, NetTrainer, arrays

# Sums over devices are taken in another order: after 20 steps that is this much in float32 and no more.
CLOSE = {"rtol": 1e-4, "atol": 5e-6}
DECAY, STEPS = 0.9, 20
KEEP_EACH_STEP = tk.Every(steps=1)


class Cnn(nn.Module):
    """A convolution with batch statistics."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3))(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=self.axis_name)(x)
        x = nn.relu(x).mean(axis=(-3, -2))
        return nn.Dense(CLASSES)(x)


class Transformer(nn.Module):
    """One block over six tokens."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Embed(12, 8)(x)
        x = x + jnp.broadcast_to(self.param("positions", nn.initializers.normal(0.1), (6, 8)), x.shape)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        x = x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(16, name="up")(nn.LayerNorm()(x))))
        return nn.Dense(CLASSES)(nn.LayerNorm()(x).mean(axis=-2))


def images(rows, seed):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, rows).astype(np.int32)
    x = rng.normal(size=(rows, 6, 6, 1)) + 0.5 * y[:, None, None, None]
    return {"x": x.astype(np.float32), "y": y}


def tokens(rows, seed):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, rows).astype(np.int32)
    return {"x": ((rng.integers(0, 6, (rows, 6)) + 2 * y[:, None]) % 12).astype(np.int32), "y": y}


def cut(make, *sizes):
    return [make(rows, seed) for seed, rows in enumerate(sizes)]


# With batch statistics nothing is padded, and replicas take only batches that divide. Else the last batch of
# each pass leaves devices with one real example, and some with none.
MODELS = {
    "mlp": (Net(norm=False, rate=0.0), cut(arrays, 16, 16, 16, 5)),
    "cnn": (Cnn(axis_name="batch"), cut(images, 16, 16, 16)),
    "transformer": (Transformer(), cut(tokens, 16, 16, 9)),
}
RULES = {
    "mlp": [(r"Dense_0/kernel", (None, "tensor")), (r"Dense_1/kernel", ("tensor", None))],
    "cnn": [(r"Conv_0/kernel", (None, None, None, "tensor")), (r"Dense_0/kernel", ("tensor", None))],
    "transformer": [
        (r"(query|key|value)/kernel", (None, "tensor", None)),
        (r"out/kernel", ("tensor", None, None)),
        (r"up/kernel", (None, "tensor")),
        (r"down/kernel", ("tensor", None)),
    ],
}
MESHES = {
    "one device": lambda rules: tk.parallel.Mesh(devices=jax.devices()[:1]),
    "data=8": lambda rules: tk.parallel.Mesh(),
    "data=2, fsdp=4": lambda rules: tk.parallel.Mesh(fsdp=4),
    "fsdp=8": lambda rules: tk.parallel.Mesh(fsdp=8),
    "data=4, tensor=2": lambda rules: tk.parallel.Mesh(tensor=2, rules=rules),
    "fsdp=4, tensor=2": lambda rules: tk.parallel.Mesh(fsdp=4, tensor=2, rules=rules),
}
STRATEGIES = {
    **MESHES,
    "PerExample": lambda rules: tk.parallel.PerExample(),
    "Pmap": lambda rules: tk.parallel.Pmap(),
}
ACCUMULATED = ("mlp", "cnn")
CELLS = [(name, model, 1) for model in MODELS for name in STRATEGIES]
CELLS += [(name, model, 2) for model in ACCUMULATED for name in STRATEGIES]


# The loop by hand -------------------------------------------------------------------------------------------


def without_axis(model):
    return model.clone(axis_name=None) if getattr(model, "axis_name", None) else model


@functools.partial(jax.jit, static_argnames="apply_fn")
def hand_pass(apply_fn, variables, batch, key):
    """Mean loss, logits, changed collections and gradients of one batch."""
    fixed = {name: value for name, value in variables.items() if name != "params"}

    def loss(params):
        logits, updated = apply_fn(
            {**fixed, "params": params}, batch["x"], train=True, rngs={"dropout": key}, mutable=list(fixed)
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean(), (logits, updated)

    (value, (logits, updated)), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    return value, logits, updated, grads


class Run:
    """What a loop by hand makes of `STEPS` updates from groups of batches, and what it logs."""

    def __init__(self, model, groups):
        model, tx = without_axis(model), optax.sgd(0.05, momentum=0.9)
        init_rng, self.rng = jax.random.split(jax.random.key(0))
        start = jax.jit(functools.partial(model.init, train=False))(init_rng, groups[0][0]["x"])
        self.params, self.stats = start["params"], start.get("batch_stats", {})
        self.opt_state, self.losses, self.accuracies = tx.init(self.params), [], []
        self.average = (self.params, self.stats)
        for step in range(STEPS):
            grads = self._group(model, groups[step % len(groups)], jax.random.fold_in(self.rng, step))
            updates, self.opt_state = tx.update(grads, self.opt_state, self.params)
            self.params = optax.apply_updates(self.params, updates)
            self.average = jax.tree.map(
                lambda e, p: DECAY * e + (1 - DECAY) * p, self.average, (self.params, self.stats)
            )

    def _group(self, model, group, key):
        total, loss, right, grads = sum(len(batch["y"]) for batch in group), 0.0, 0, None
        for index, batch in enumerate(group):
            own = key if len(group) == 1 else jax.random.fold_in(key, index)
            stats = {"batch_stats": self.stats} if self.stats else {}
            value, logits, updated, grad = hand_pass(
                model.apply, {"params": self.params, **stats}, batch, own
            )
            share = len(batch["y"]) / total
            grad = jax.tree.map(lambda leaf, share=share: leaf * share, grad)
            grads = grad if grads is None else jax.tree.map(jnp.add, grads, grad)
            loss, right = loss + share * float(value), right + int((logits.argmax(-1) == batch["y"]).sum())
            self.stats = updated.get("batch_stats", {})
        self.losses.append(loss)
        self.accuracies.append(right / total)
        return grads


@functools.cache
def by_hand(name, accumulate):
    model, data = MODELS[name]
    return Run(model, [data[index : index + accumulate] for index in range(0, len(data), accumulate)])


# The table --------------------------------------------------------------------------------------------------

TABLE = {}
# Every program that XLA compiles, and how many there were after each step of a fit.
PROGRAMS, COMPILED = [], []


def _note_program(event, duration, **kwargs):
    if event == "/jax/core/compile/backend_compile_duration":
        PROGRAMS.append(event)


@pytest.fixture(autouse=True)
def _programs():
    jax.monitoring.register_event_duration_secs_listener(_note_program)
    yield
    jax.monitoring.unregister_event_duration_listener(_note_program)


@pytest.fixture(scope="module", autouse=True)
def _table():
    """Prints the largest difference of each cell, for those who run this with -s."""
    yield
    columns = [*MODELS, *(f"{name} k=2" for name in ACCUMULATED)]
    print(f"\n{'':<18}" + "".join(f"{column:>13}" for column in columns))
    for name in STRATEGIES:
        found = [TABLE.get((name, column)) for column in columns]
        print(f"{name:<18}" + "".join(f"{'' if v is None else f'{v:.1e}':>13}" for v in found))


def largest_difference(actual, expected):
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max(initial=0)) for a, b in pairs)


def fit(strategy, name, accumulate=1):
    model, data = MODELS[name]
    counter = tk.callbacks.Lambda(on_step=lambda info: COMPILED.append(len(PROGRAMS)))
    COMPILED.clear()
    callbacks = [tk.callbacks.EMA(DECAY), tk.callbacks.LogMetrics(every=KEEP_EACH_STEP), counter]
    made = NetTrainer(
        model,
        optax.sgd(0.05, momentum=0.9),
        strategy=strategy,
        callbacks=callbacks,
        accumulate=accumulate,
        steps_per_call=1,  # to find another number by measurement compiles programs, at moments of its own
    )
    return made, made.fit(data, steps=STEPS)


@pytest.mark.parametrize(
    ("strategy", "name", "accumulate"), CELLS, ids=lambda value: str(value).replace(", ", "-")
)
def test_equals_one_device(strategy, name, accumulate):
    expected = by_hand(name, accumulate)
    made, result = fit(STRATEGIES[strategy](RULES[name]), name, accumulate)
    state, ema = result.state, result.state.hooks["ema"]
    got = jax.device_get((state.params, state.opt_state, state.batch_stats, (ema.params, ema.batch_stats)))
    losses, accuracies = (
        np.array([value for _, value in result.history[key]]) for key in ("train/loss", "train/accuracy")
    )
    wanted = (expected.params, expected.opt_state, expected.stats, expected.average)
    column = name if accumulate == 1 else f"{name} k=2"
    TABLE[strategy, column] = largest_difference((*got, losses), (*wanted, np.array(expected.losses)))
    assert_same(got, jax.device_get(wanted), **CLOSE)
    assert_same(state.rng, expected.rng)
    np.testing.assert_allclose(losses, expected.losses, rtol=2e-4)
    # float32 on the device, so a third of 16 is not a third to the last bit.
    np.testing.assert_allclose(accuracies, expected.accuracies, rtol=1e-6)
    assert int(ema.count) == result.step == STEPS
    # Three batches by twos leave a group of one, which is a program of its own.
    odd_group = accumulate == 2 and name == "cnn"
    # Before the first padded batch the losses of its rows are looked at, by a program of their own.
    looked = name != "cnn"
    assert COMPILED[-1] == COMPILED[1 if odd_group else 0] + looked
    assert made._engine.steps.traces.count("training") == (2 if odd_group else 1)


# Batch statistics without an axis name ----------------------------------------------------------------------


@functools.cache
def net_by_hand(model, rows):
    return Run(model, [[batch] for batch in cut(arrays, *rows)])


@pytest.mark.parametrize("strategy", MESHES)
def test_statistics_without_an_axis_name_and_dropout_are_those_of_one_device_under_a_mesh(strategy):
    model, data = Net(norm=True, rate=0.5), cut(arrays, 16, 16, 16)
    expected = net_by_hand(model, (16, 16, 16))
    made = NetTrainer(model, optax.sgd(0.05, momentum=0.9), strategy=MESHES[strategy](RULES["mlp"]))
    state = made.fit(data, steps=STEPS).state
    got = jax.device_get((state.params, state.opt_state, state.batch_stats))
    assert_same(got, jax.device_get((expected.params, expected.opt_state, expected.stats)), **CLOSE)


def test_without_an_axis_name_examples_differ_which_is_refused_by_name():
    made = NetTrainer(Net(), optax.sgd(0.1), strategy="vmap")
    with pytest.raises(ValueError, match=r"batch_stats/BatchNorm_0/mean.*axis_name='batch'"):
        made.fit(cut(arrays, 16), epochs=1)


class NormFirst(nn.Module):
    """Statistics of the input, which no parameter changes."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.75)(x)
        return nn.Dense(CLASSES)(x)


def test_without_an_axis_name_replicas_are_merged_as_a_mixture_after_every_step():
    data = cut(arrays, 16, 24)
    made = NetTrainer(NormFirst(), optax.sgd(0.1), strategy="pmap")
    mean, var = np.zeros(8), np.ones(8)
    for step in range(4):
        state = made.fit(data, steps=1).state
        replicas = np.split(data[step % 2]["x"].astype(np.float64), 8)
        means = np.stack([0.75 * mean + 0.25 * rows.mean(0) for rows in replicas])
        variances = np.stack([0.75 * var + 0.25 * rows.var(0) for rows in replicas])
        mean = means.mean(0)
        var = (variances + means**2).mean(0) - mean**2
        stats = state.batch_stats["BatchNorm_0"]
        np.testing.assert_allclose(stats["mean"], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats["var"], var, rtol=1e-5, atol=1e-6)
        # The mean of the variances is another number, and every replica holds the mixture's.
        assert np.abs(variances.mean(0) - var).max() > 1e-3
        shards = [np.asarray(shard.data) for shard in stats["var"].addressable_shards]
        assert_same(shards, 8 * [shards[0]])


# Noise ------------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Its gradient is the mask that dropout drew for each example."""

    @nn.compact
    def __call__(self, row):
        seen = self.param("seen", nn.initializers.zeros, (16, 32))[row]
        return (seen * nn.Dropout(0.5, deterministic=False)(jnp.ones(seen.shape))).sum(-1)


class NoisyTrainer(tk.Trainer):
    def loss(self, model, batch, ctx):
        return -8.0 * model(batch["row"]), {}


def drawn(strategy):
    """The masks of two steps, `bool[2, 16, 32]`, and the key of the run."""
    made = NoisyTrainer(Noisy(), optax.sgd(1.0), strategy=strategy)
    data = [{"row": np.arange(16, dtype=np.int32)}]
    seen = [np.zeros((16, 32))]
    for _ in range(2):
        seen.append(np.asarray(made.fit(data, steps=1).state.params["seen"]))
    return np.diff(np.stack(seen), axis=0) > 0.5, made.state.rng


def masks_of(key, rows):
    def total(seen):
        return Noisy().apply({"params": {"seen": seen}}, rows, rngs={"dropout": key}).sum()

    return np.asarray(jax.grad(total)(jnp.ones((16, 32))))[rows] > 0


@pytest.mark.parametrize("strategy", ["vmap", "pmap"])
def test_masks_are_independent_and_reproducible(strategy):
    masks, rng = drawn(strategy)
    np.testing.assert_array_equal(drawn(strategy)[0], masks)
    # 2 x 16 rows of 32 fair coins: no two alike, about half of each kind, and no row predicts another.
    assert len({row.tobytes() for step in masks for row in step}) == 32
    assert abs(masks.mean() - 0.5) < 4 * 0.5 / np.sqrt(masks.size)
    agreement = (masks.reshape(32, 1, 32) == masks.reshape(1, 32, 32)).mean(-1)[np.triu_indices(32, 1)]
    assert agreement.max() < 0.9
    assert abs(agreement.mean() - 0.5) < 0.02
    # By hand: the key of the step, split over the examples or folded with the number of the device.
    for step in range(2):
        key = jax.random.fold_in(rng, step)
        if strategy == "vmap":
            expected = [masks_of(own, row) for row, own in enumerate(jax.random.split(key, 16))]
            np.testing.assert_array_equal(masks[step], expected)
        else:
            rows = np.arange(16).reshape(8, 2)
            expected = [masks_of(jax.random.fold_in(key, device), rows[device]) for device in range(8)]
            np.testing.assert_array_equal(masks[step], np.concatenate(expected))


# Evaluation and padding ------------------------------------------------------------------------------------


class NanInPadding(NetTrainer):
    """Whatever pads becomes NaN, in the losses and in the outputs."""

    def loss(self, model, batch, ctx):
        losses, outputs = super().loss(model, batch, ctx)
        logits = jnp.where(ctx.mask[..., None], outputs["logits"], jnp.nan)
        return jnp.where(ctx.mask, losses, jnp.nan), {**outputs, "logits": logits}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_evaluation_is_exact_and_compiles_once(strategy):
    model = Cnn(axis_name="batch")
    made = NanInPadding(model, optax.sgd(0.1), strategy=STRATEGIES[strategy](RULES["cnn"]))
    made.init(images(16, 0))
    variables = jax.device_get(made.state.variables)
    for size in (97, 5, 1):
        data = images(size, seed=size)
        logits = np.asarray(without_axis(model).apply(variables, data["x"], train=False), np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        got = made.evaluate(tk.data.Arrays(data, batch_size=12))
        np.testing.assert_allclose(got["loss"], -log_p[np.arange(size), data["y"]].mean(), rtol=1e-5)
        assert got["accuracy"] == pytest.approx((logits.argmax(-1) == data["y"]).mean(), abs=1e-12)
        if size == 5:
            predicted = made.predict(tk.data.Arrays(data, batch_size=12))
            np.testing.assert_allclose(predicted["logits"], logits, rtol=1e-4, atol=1e-5)
    # 12 rows are padded to 16 over eight devices; a first batch of 5 and one of 1 to 8.
    shapes = {-(-min(size, 12) // made._strategy.shards) for size in (97, 5, 1)}
    assert made._engine.steps.traces.count("evaluation") == len(shapes)


@pytest.mark.parametrize("strategy", ["data=8", "fsdp=8", "PerExample", "Pmap"])
def test_nan_in_padding_does_no_harm_in_training(strategy):
    model, data = MODELS["mlp"]
    made = NanInPadding(model, optax.sgd(0.05, momentum=0.9), strategy=STRATEGIES[strategy](RULES["mlp"]))
    result = made.fit(data, steps=STEPS)
    assert_same(jax.device_get(result.state.params), jax.device_get(by_hand("mlp", 1).params), **CLOSE)
    # 5 of 16 in the last batch of each pass, weighted by examples.
    expected = by_hand("mlp", 1)
    np.testing.assert_allclose(
        result.history.last("train/loss"), np.average(expected.losses, weights=5 * [16, 16, 16, 5]), rtol=1e-4
    )


@pytest.mark.parametrize("strategy", ["data=8", "PerExample", "Pmap"])
def test_the_public_check_passes(strategy):
    tk.testing.check_strategy(STRATEGIES[strategy](()))
