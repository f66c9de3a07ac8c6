"""Weighted losses: one quotient over all of a step, a range of steps, or an evaluation; against NumPy and by hand."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clu import metrics
from flax import linen as nn

import trainkit as tk
from tests.helpers.compare import assert_same

TIME = 4


class Tagger(nn.Module):
    """One number a token."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(x)[..., 0]


class TaggerTrainer(tk.Trainer):
    def loss(self, model, batch, ctx):
        predicted = model(batch["x"])
        losses = (predicted - batch["y"]) ** 2
        return tk.Weighted(losses, batch["w"]), {"error": jnp.abs(predicted - batch["y"]), "w": batch["w"]}


def tokens(rows, seed=0):
    """Rows of very unequal weight."""
    draw = np.random.default_rng(seed)
    length = draw.integers(1, TIME + 1, size=rows)
    scale = draw.integers(1, 9, size=(rows, 1))
    return {
        "x": draw.normal(size=(rows, TIME, 3)).astype(np.float32),
        "y": draw.normal(size=(rows, TIME)).astype(np.float32),
        "w": ((np.arange(TIME) < length[:, None]) * scale).astype(np.float32),
    }


def cut(data, size):
    return [{name: leaf[i : i + size] for name, leaf in data.items()} for i in range(0, len(data["x"]), size)]


@jax.jit
def by_hand(params, batch):
    """The quotient over a batch, and its gradient."""

    def quotient(params):
        losses = (Tagger().apply({"params": params}, batch["x"]) - batch["y"]) ** 2
        return (losses * batch["w"]).sum() / batch["w"].sum()

    return jax.value_and_grad(quotient)(params)


def descended(params, *steps, rate=0.1):
    """The parameters after plain gradient descent on each batch, and the losses on the way."""
    losses = []
    for batch in steps:
        loss, grads = by_hand(params, batch)
        params = jax.tree.map(lambda leaf, grad: leaf - rate * grad, params, grads)
        losses.append(float(loss))
    return params, losses


def expected_loss(params, data):
    predicted = data["x"].astype(np.float64) @ np.asarray(params["Dense_0"]["kernel"], np.float64)
    losses = (predicted[..., 0] + float(params["Dense_0"]["bias"][0]) - data["y"]) ** 2
    return (losses * data["w"]).sum() / data["w"].sum()


def test_micro_batches_of_unequal_weight_are_one_quotient():
    data = tokens(12)
    trainer = TaggerTrainer(Tagger(), optax.sgd(0.1), accumulate=3)
    start = trainer.init(data).params
    # Batches of 4, 4 and 3 make one step, the last one padded; the tail of a row is a step of its own.
    batches = [*cut({k: v[:11] for k, v in data.items()}, 4), {k: v[11:] for k, v in data.items()}]
    result = trainer.fit(batches, epochs=1)
    params, _ = descended(start, {k: v[:11] for k, v in data.items()}, batches[-1])
    assert result.step == 2
    assert_same(result.state.params, params, rtol=1e-5, atol=1e-6)


def test_rows_of_four_tokens_and_of_one_are_five_tokens():
    class Scale(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x * self.param("w", nn.initializers.ones, ())

    class Plain(tk.Trainer):
        def loss(self, model, batch, ctx):
            return tk.Weighted(model(batch["x"]), batch["w"]), {}

    x = np.array([[1, 1, 1, 1], [10, 0, 0, 0]], np.float32)
    batches = [{"x": row[None], "w": row[None] != 0} for row in x]
    result = Plain(Scale(), optax.sgd(1.0), accumulate=2).fit(batches, epochs=1)
    assert result.history.last("train/loss") == pytest.approx(2.8, rel=1e-6)
    np.testing.assert_allclose(result.state.params["w"], 1 - 2.8, rtol=1e-6)


def test_one_batch_is_bitwise_the_quotient_written_by_hand():
    data = tokens(8)
    trainer = TaggerTrainer(Tagger(), optax.sgd(0.1))
    params = trainer.init(data).params

    @jax.jit
    def step(state, batch):
        def quotient(params):
            losses = (Tagger().apply({"params": params}, batch["x"]) - batch["y"]) ** 2
            return (losses * batch["w"]).sum() / batch["w"].sum()

        return state.apply_gradients(grads=jax.grad(quotient)(state.params))

    state = tk.TrainState.from_variables(
        apply_fn=Tagger().apply, variables={"params": params}, tx=optax.sgd(0.1), rng=jax.random.key(0)
    )
    assert_same(trainer.fit([data], steps=1).state.params, step(state, data).params)


def test_the_logged_loss_is_one_quotient_over_its_range():
    data = tokens(12)
    trainer = TaggerTrainer(Tagger(), optax.sgd(0.0))  # the weights stay: the range is one average
    params = trainer.init(data).params
    result = trainer.fit(cut(data, 4), epochs=1)
    assert result.history.last("train/loss") == pytest.approx(expected_loss(params, data), rel=1e-5)


def test_an_evaluation_is_one_quotient_for_every_batch_size():
    data, trainer = tokens(10), TaggerTrainer(Tagger(), optax.sgd(0.1))
    expected = expected_loss(trainer.init(data).params, data)
    for size in (10, 4, 1):  # in a loop on the device, padded where 10 does not divide
        found = trainer.evaluate(tk.data.Arrays(data, batch_size=size))
        assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.evaluate(cut(data, 4))["loss"] == pytest.approx(expected, rel=1e-5)  # batch by batch


def test_metrics_get_the_quotient_and_the_weight_of_each_row():
    @flax.struct.dataclass
    class Seen(metrics.Collection):
        loss: metrics.Average.from_output("loss")
        rows: tk.metrics.collecting(["loss", "weight"], lambda rows: np.stack([rows["loss"], rows["weight"]]))
        error: tk.metrics.Mean.from_output("error", weights="w")
        perplexity: tk.metrics.Perplexity

    class Watched(TaggerTrainer):
        metrics = Seen

    data = tokens(7)
    data["w"][2] = 0
    trainer = Watched(Tagger(), optax.sgd(0.1))
    params = trainer.init(data).params
    found = trainer.evaluate(tk.data.Arrays(data, batch_size=4))
    error = np.asarray(jnp.abs(Tagger().apply({"params": params}, data["x"]) - data["y"]))
    weight = data["w"].sum(axis=1)
    each = (error**2 * data["w"]).sum(axis=1) / np.where(weight, weight, 1)
    np.testing.assert_allclose(found["rows"], [each, weight], rtol=1e-5)
    assert found["error"] == pytest.approx((error * data["w"]).sum() / weight.sum(), rel=1e-5)
    assert found["loss"] == pytest.approx((each * weight).sum() / weight.sum(), rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"]), rel=1e-5)


def test_what_has_no_weight_may_be_nan():
    class Holes(TaggerTrainer):
        def loss(self, model, batch, ctx):
            weighted, outputs = super().loss(model, batch, ctx)
            return tk.Weighted(jnp.where(batch["w"] > 0, weighted.losses, jnp.nan), batch["w"]), outputs

    data = tokens(6)
    trainer = Holes(Tagger(), optax.sgd(0.1), callbacks=[tk.callbacks.NanGuard("raise")])
    start = trainer.init(data).params
    result = trainer.fit([data], steps=1, eval_data=[data])
    params, losses = descended(start, data)
    assert_same(result.state.params, params, rtol=1e-5, atol=1e-6)
    assert result.history.last("train/loss") == pytest.approx(losses[0], rel=1e-5)
    assert np.isfinite(result.history.last("eval/loss"))


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_step_without_weight_moves_nothing_but_the_step(precision):
    data = tokens(4)
    empty = {**data, "w": np.zeros_like(data["w"])}
    log = tk.callbacks.LogMetrics(every=tk.Every(steps=1))
    guard, average = tk.callbacks.NanGuard("raise"), tk.callbacks.EMA(0.9)
    trainer = TaggerTrainer(Tagger(), optax.adam(0.1), precision=precision, callbacks=[log, guard, average])
    before = trainer.fit([data], steps=1).state
    kept = jax.device_get((before.params, before.opt_state, before.hooks))
    result = trainer.fit([empty], steps=2)
    after = result.state
    assert result.step == int(after.step) == 3
    assert_same(jax.device_get((after.params, after.opt_state, after.hooks)), kept)
    assert [step for step, _ in result.history["train/loss"]] == [1]


def test_weights_are_constants_to_the_gradient():
    class Confident(tk.Trainer):
        def loss(self, model, batch, ctx):
            predicted = model(batch["x"])
            return tk.Weighted((predicted - batch["y"]) ** 2, jax.nn.sigmoid(predicted)), {}

    data = tokens(4)
    trainer = Confident(Tagger(), optax.sgd(0.1))
    start = trainer.init(data).params
    weights = np.asarray(jax.nn.sigmoid(Tagger().apply({"params": start}, data["x"])))
    params, _ = descended(start, {**data, "w": weights})
    assert_same(trainer.fit([data], steps=1).state.params, params, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", ["tokens", "scalar"])
def test_a_loss_of_one_example_may_be_weighted(shape):
    class OneByOne(tk.Trainer):
        def loss(self, model, batch, ctx):
            losses = (model(batch["x"]) - batch["y"]) ** 2
            if shape == "tokens":
                return tk.Weighted(losses, batch["w"]), {}
            weight = batch["w"].sum()
            return tk.Weighted((losses * batch["w"]).sum() / weight, weight), {}

    data = tokens(6)
    trainer = OneByOne(Tagger(), optax.sgd(0.1), strategy="vmap")
    start = trainer.init(data).params
    result = trainer.fit([data], steps=1)
    params, losses = descended(start, data)
    assert_same(result.state.params, params, rtol=1e-5, atol=1e-6)
    assert result.history.last("train/loss") == pytest.approx(losses[0], rel=1e-5)


def test_hooks_are_told_the_quotient_also_of_an_own_train_step():
    class Told(tk.callbacks.Callback):
        def step_hook(self):
            return tk.hooks.StepHook(
                "told", init=lambda state: jnp.zeros(()), update=lambda memory, values: values.loss
            )

    class Own(TaggerTrainer):
        def train_step(self, state, batch):
            return super().train_step(state, batch)

    data = tokens(5)
    for kind in (TaggerTrainer, Own):
        trainer = kind(Tagger(), optax.sgd(0.1), callbacks=[Told()])
        params = trainer.init(data).params
        result = trainer.fit([data], steps=1)
        assert float(result.state.hooks["told"]) == pytest.approx(expected_loss(params, data), rel=1e-5)
        assert result.history.last("train/loss") == pytest.approx(expected_loss(params, data), rel=1e-5)


def test_a_mean_of_the_loss_that_would_be_unweighted_is_refused():
    class Last(TaggerTrainer):
        metrics = metrics.Collection.create(loss=metrics.LastValue.from_output("loss"))

    with pytest.raises(TypeError, match=r"tk\.metrics\.Mean\.from_output\('loss', weights='weight'\)"):
        Last(Tagger(), optax.sgd(0.1)).fit([tokens(4)], steps=1)


WRONG = {
    "two shapes": (
        lambda b: tk.Weighted(b["y"], b["w"][:, 0]),
        r"\[4, 4\] and weights of shape \[4\].*broadcast_to",
    ),
    "no rows": (
        lambda b: tk.Weighted(b["y"].mean(), b["w"].mean()),
        r"shape \[\] for a batch of 4.*batch_axis = None",
    ),
    "ints": (lambda b: tk.Weighted(b["w"].astype(int), b["w"]), "float dtype"),
    "words": (lambda b: tk.Weighted(b["y"], "w"), "weights of type str"),
    "complex": (lambda b: tk.Weighted(b["y"], b["w"] + 1j), "weights of dtype complex64"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_pair_of_one_shape_is_refused_with_the_cure(name):
    make, message = WRONG[name]

    class Wrong(tk.Trainer):
        def loss(self, model, batch, ctx):
            model(batch["x"])
            return make(jax.tree.map(jnp.asarray, batch)), {}

    with pytest.raises((TypeError, ValueError), match=message):
        Wrong(Tagger(), optax.sgd(0.1)).fit([tokens(4)], steps=1)


def test_an_output_named_weight_is_taken_only_beside_weights():
    class Named(tk.Trainer):
        def loss(self, model, batch, ctx):
            losses = ((model(batch["x"]) - batch["y"]) ** 2).mean(axis=1)
            weighted = tk.Weighted(losses, batch["w"][:, 0]) if self.weighted else losses
            return weighted, {"weight": batch["w"][:, 0]}

    trainer = Named(Tagger(), optax.sgd(0.1))
    trainer.weighted = False
    trainer.fit([tokens(4)], steps=1)
    trainer = Named(Tagger(), optax.sgd(0.1))
    trainer.weighted = True
    with pytest.raises(ValueError, match=r"named \['weight'\].*Rename"):
        trainer.fit([tokens(4)], steps=1)
