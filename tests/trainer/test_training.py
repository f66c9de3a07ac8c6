"""Training against loops written by hand: the same batches, the same keys."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clu import metrics
from flax import linen as nn

import trainkit as tk
from tests.helpers.by_hand import hand_step, start
from tests.helpers.compare import assert_same
from tests.helpers.digits import CLASSES, Net, NetTrainer, arrays, batches
from trainkit._core import history as history_module


@pytest.mark.parametrize("norm", [True, False])
def test_bitwise_equal_to_a_hand_written_loop(norm):
    model, tx, data = Net(norm=norm), optax.adam(1e-2), batches(7)
    result = NetTrainer(model, tx, seed=3).fit(data, steps=20)
    state = start(model, tx, data[0], seed=3)
    for index in range(20):
        state, _ = hand_step(state, data[index % 7])
    assert_same(result.state.params, state.params)
    assert_same(result.state.opt_state, state.opt_state)
    assert_same(result.state.model_state, state.model_state)
    assert_same(result.state.rng, state.rng)
    assert result.step == int(result.state.step) == 20


def test_logged_values_are_means_over_the_steps_since_the_last_log():
    model, tx, data = Net(), optax.adam(1e-2), batches(4)
    log = tk.callbacks.LogMetrics(every=tk.Every(steps=5))
    result = NetTrainer(model, tx, callbacks=[log]).fit(data, steps=12)
    state, losses = start(model, tx, data[0]), []
    for index in range(12):
        state, value = hand_step(state, data[index % 4])
        losses.append(float(value))
    expected = [(5, np.mean(losses[:5])), (10, np.mean(losses[5:10])), (12, np.mean(losses[10:]))]
    assert [step for step, _ in result.history["train/loss"]] == [5, 10, 12]
    np.testing.assert_allclose(
        [v for _, v in result.history["train/loss"]], [v for _, v in expected], rtol=1e-6
    )


def test_a_second_fit_continues():
    data = batches(5)
    whole = NetTrainer(Net(), optax.adam(1e-2)).fit(data, steps=13)
    trainer = NetTrainer(Net(), optax.adam(1e-2))
    first = trainer.fit(data, steps=6)
    kept = jax.device_get(first.state.params)
    second = trainer.fit(data, steps=7)
    assert_same(second.state.params, whole.state.params)
    assert (second.step, second.epoch, whole.epoch) == (13, 3, 3)
    assert_same(jax.device_get(first.state.params), kept)


def test_epochs_finish_a_pass_begun():
    data, trainer = batches(5), NetTrainer(Net(), optax.adam(1e-2))
    trainer.fit(data, steps=3)
    assert trainer.fit(data, epochs=1).step == 5
    assert trainer.fit(data, epochs=2).step == 15
    assert trainer.fit(batches(2, seed=9), epochs=1).step == 17


def test_result_and_history():
    result = NetTrainer(Net(), optax.adam(1e-2)).fit(
        tk.data.Arrays(arrays(), batch_size=16), epochs=2, eval_data={"a": batches(2), "b": batches(1)}
    )
    assert (result.step, result.epoch, result.stopped_by) == (12, 2, None)
    assert result.seconds > 0
    assert [step for step, _ in result.history["a/loss"]] == [6, 12]
    assert {"train/loss", "train/accuracy", "a/accuracy", "b/accuracy", "epoch"} <= set(result.history)
    columns = result.history.to_arrays()
    assert len(columns["step"]) == len(columns["b/loss"]) == len(result.history.to_rows())
    assert result.history.to_rows()[-1]["b/loss"] == result.history.last("b/loss")
    with pytest.raises(KeyError, match=r"evaluation/loss.*a/loss"):
        result.history["evaluation/loss"]


def test_padded_last_batch_is_exact_without_compiling_again():
    data = arrays(40)
    model, tx = Net(norm=False, rate=0.0), optax.sgd(0.1)
    trainer = NetTrainer(model, tx)
    result = trainer.fit(tk.data.Arrays(data, batch_size=16), epochs=2)
    state = start(model, tx, data)
    for _ in range(2):
        for index in range(0, 40, 16):
            state, _ = hand_step(state, {name: value[index : index + 16] for name, value in data.items()})
    assert_same(result.state.params, state.params, rtol=1e-5, atol=1e-6)
    assert trainer._engine.steps.traces.count("training") == 1


def test_batch_statistics_see_no_padding(caplog):
    data = arrays(40)
    model, tx = Net(rate=0.0), optax.sgd(0.1)
    result = NetTrainer(model, tx).fit(tk.data.Arrays(data, batch_size=16), epochs=2)
    state = start(model, tx, data)
    for _ in range(2):
        for index in range(0, 40, 16):
            state, _ = hand_step(state, {name: value[index : index + 16] for name, value in data.items()})
    assert_same(result.state.batch_stats, state.batch_stats)
    assert (
        sum("own shape, because the model keeps batch statistics" in r.message for r in caplog.records) == 1
    )


class ScalarTrainer(NetTrainer):
    def loss(self, model, batch, ctx):
        losses, outputs = super().loss(model, batch, ctx)
        return losses.mean(), outputs


def test_scalar_losses_give_the_same_update_and_exact_means():
    data = batches(4)
    scalar = ScalarTrainer(Net(), optax.adam(1e-2)).fit(data, steps=10)
    each = NetTrainer(Net(), optax.adam(1e-2)).fit(data, steps=10)
    assert_same(scalar.state.params, each.state.params)
    np.testing.assert_allclose(scalar.history.last("train/loss"), each.history.last("train/loss"), rtol=1e-6)


class Autoencoder(nn.Module):
    def setup(self):
        self.encoder, self.decoder = nn.Dense(3), nn.Dense(8)
        self.count = self.variable("counts", "calls", jnp.zeros, ())

    def encode(self, x):
        if not self.is_initializing() and self.is_mutable_collection("counts"):
            self.count.value += 1
        self.sow("penalties", "code", (self.encoder(x) ** 2).mean())
        return self.encoder(x)

    def decode(self, code):
        return self.decoder(code)


class AutoencoderTrainer(tk.Trainer):
    def loss(self, model, batch, ctx):
        noise = 0.1 * jax.random.normal(model.make_rng("noise"), batch.shape) if ctx.train else 0.0
        code = model.encode(batch + noise)
        again = model.decode(model.encode(batch))
        (first, second) = model.variables["penalties"]["code"]
        losses = ((model.decode(code) - batch) ** 2).mean(-1) + ((again - batch) ** 2).mean(-1)
        return losses + 0.01 * (first + second), {"code": code}


def test_methods_streams_sown_values_and_collections():
    x = arrays()["x"]
    log = tk.callbacks.LogMetrics(every=tk.Every(steps=2))
    trainer = AutoencoderTrainer(Autoencoder(), optax.adam(1e-2), callbacks=[log])
    result = trainer.fit([x, x], epochs=5)
    assert sorted(result.state.variables) == ["counts", "params"]
    assert float(result.state.collections["counts"]["calls"]) == 20
    assert trainer.evaluate([x])["loss"] > 0
    assert float(trainer.state.collections["counts"]["calls"]) == 20
    losses = [value for _, value in result.history["train/loss"]]
    assert losses[-1] < 0.9 * losses[0]


class TwoOptimizers(NetTrainer):
    def train_step(self, state, batch):
        def loss(params):
            logits = state.apply_fn({**state.variables, "params": params}, batch["x"], train=False)
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean(), logits

        (value, logits), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        state = state.apply_gradients(grads=grads).apply_gradients(grads=grads)
        return state, {"loss": value, "logits": logits, "labels": batch["y"]}


def test_an_overridden_train_step_is_one_step():
    data, model, tx = batches(3), Net(norm=False), optax.sgd(0.05)
    result = TwoOptimizers(model, tx).fit(data, epochs=2)
    assert result.step == 6
    state = start(model, tx, data[0])

    @jax.jit
    def twice(state, batch):
        def loss(params):
            logits = state.apply_fn({"params": params}, batch["x"], train=False)
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

        grads = jax.grad(loss)(state.params)
        return state.apply_gradients(grads=grads).apply_gradients(grads=grads)

    for index in range(6):
        state = twice(state, data[index % 3])
    assert_same(result.state.params, state.params)


class Extended(NetTrainer):
    def train_step(self, state, batch):
        state, outputs = super().train_step(state, batch)
        return state.replace(params=jax.tree.map(lambda p: p * 0.5, state.params)), outputs

    def eval_step(self, state, batch):
        outputs = super().eval_step(state, batch)
        return {**outputs, "loss": outputs["loss"] * 0 + 7}


def test_super_works_in_overridden_steps():
    data = batches(1)
    extended = Extended(Net(), optax.sgd(0.1))
    halved = extended.fit(data, steps=1).state.params
    plain = NetTrainer(Net(), optax.sgd(0.1)).fit(data, steps=1).state.params
    assert_same(halved, jax.tree.map(lambda p: p * 0.5, plain))
    assert extended.evaluate(data)["loss"] == 7


class FromZero(NetTrainer):
    def init_variables(self, rng, batch):
        return jax.tree.map(jnp.zeros_like, super().init_variables(rng, batch))


def test_init_variables_can_be_overridden():
    state = FromZero(Net(), optax.sgd(0.1)).init(batches(1)[0])
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize("size", [1, 7, 40, 97])
@pytest.mark.parametrize("batch_size", [1, 16, 40])
def test_evaluation_is_exact(size, batch_size):
    data, trainer = arrays(size), NetTrainer(Net(), optax.sgd(0.1))
    trainer.init(arrays(16))
    got = trainer.evaluate(tk.data.Arrays(data, batch_size=batch_size))
    logits = np.asarray(trainer.state.apply_fn(trainer.state.variables, data["x"], train=False), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(got["loss"], -log_p[np.arange(size), data["y"]].mean(), rtol=1e-5)
    assert got["accuracy"] == pytest.approx((logits.argmax(-1) == data["y"]).mean(), abs=1e-12)
    assert trainer._engine.steps.traces.count("evaluation") == 1


class Predictor(NetTrainer):
    def predict_step(self, model, batch, ctx):
        return {"probabilities": nn.softmax(model(batch["x"], train=ctx.train))}


def test_predict_returns_each_example_in_order():
    data, trainer = arrays(37), Predictor(Net(), optax.sgd(0.1))
    trainer.init(arrays(16))
    got = trainer.predict(tk.data.Arrays({"x": data["x"]}, batch_size=16))
    expected = nn.softmax(trainer.state.apply_fn(trainer.state.variables, data["x"], train=False))
    assert got["probabilities"].shape == (37, CLASSES)
    np.testing.assert_allclose(got["probabilities"], expected, rtol=1e-5, atol=1e-6)
    unlabelled = NetTrainer(Net(), optax.sgd(0.1))
    unlabelled.init(arrays(16))
    with pytest.raises(KeyError, match="predict_step"):
        unlabelled.predict([{"x": data["x"]}])


def test_ema_follows_its_formula_and_evaluation_reads_it():
    data, decay = batches(4), 0.8
    trainer = NetTrainer(Net(), optax.adam(1e-2), callbacks=[tk.callbacks.EMA(decay)])
    expected, seen = None, trainer.init(data[0])
    expected = jax.tree.map(np.asarray, (seen.params, seen.batch_stats))
    for index in range(6):
        state = trainer.fit(data, steps=1).state
        now = jax.tree.map(np.asarray, (state.params, state.batch_stats))
        expected = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, expected, now)
        assert int(state.hooks["ema"].count) == index + 1
    ema = state.hooks["ema"]
    assert_same(jax.tree.map(np.asarray, (ema.params, ema.batch_stats)), expected, rtol=1e-5, atol=1e-6)
    averaged = tk.callbacks.EMA.view(state)
    assert_same(averaged.params, ema.params)
    live, smooth = trainer.evaluate(data, weights="live"), trainer.evaluate(data)
    by_hand = NetTrainer(Net(), optax.adam(1e-2))
    by_hand.state = averaged.replace(hooks={})
    assert smooth == by_hand.evaluate(data)
    assert live != smooth


def test_debiased_ema_is_optax_own():
    data, decay = batches(3), 0.7
    callback = tk.callbacks.EMA(decay, debias=True, batch_stats=False)
    trainer = NetTrainer(Net(), optax.adam(1e-2), callbacks=[callback])
    reference = optax.ema(decay, debias=True)
    memory = reference.init(trainer.init(data[0]).params)
    for _ in range(5):
        state = trainer.fit(data, steps=1).state
        average, memory = reference.update(state.params, memory)
    assert_same(tk.callbacks.EMA.view(state).params, average, rtol=1e-6, atol=1e-7)
    assert_same(tk.callbacks.EMA.view(state).batch_stats, state.batch_stats)


def test_ema_copies_integers_and_widens_halves():
    from trainkit.hooks._ema import ema_hook, view
    from trainkit.hooks._hook import StepValues

    params = {"table": jnp.arange(3), "w": jnp.ones(3, jnp.bfloat16)}
    state = tk.TrainState.create(apply_fn=None, params=params, tx=optax.identity())
    hook = ema_hook("ema", 0.999, debias=False, batch_stats=True)
    memory = hook.init(state)
    state = state.replace(params={"table": jnp.arange(3) + 5, "w": jnp.zeros(3, jnp.bfloat16)})
    for _ in range(2):
        memory = hook.update(memory, StepValues(state, jnp.zeros(()), None))
    assert_same(memory.params["table"], jnp.arange(3) + 5)
    np.testing.assert_allclose(memory.params["w"], 0.999**2, rtol=1e-6)
    assert view(state, memory).params["w"].dtype == jnp.bfloat16


@flax.struct.dataclass
class Rich(metrics.Collection):
    loss: metrics.Average.from_output("loss")
    accuracy: metrics.Accuracy
    confusion: tk.metrics.ConfusionMatrix.of(CLASSES)
    spread: tk.metrics.Std.from_output("loss")


class RichTrainer(NetTrainer):
    metrics = Rich


def test_metrics_that_are_arrays():
    data, trainer = arrays(50), RichTrainer(Net(), optax.sgd(0.1))
    trainer.fit(tk.data.Arrays(data, batch_size=16), epochs=1)
    got = trainer.evaluate(tk.data.Arrays(data, batch_size=16))
    logits = np.asarray(trainer.state.apply_fn(trainer.state.variables, data["x"], train=False))
    expected = np.zeros((CLASSES, CLASSES), int)
    np.add.at(expected, (data["y"], logits.argmax(-1)), 1)
    np.testing.assert_array_equal(got["confusion"], expected)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, data["y"])
    np.testing.assert_allclose(got["spread"], np.std(losses), rtol=1e-4)


def test_metrics_may_be_left_out():
    class Bare(tk.Trainer):
        loss = NetTrainer.loss

    assert Bare(Net(), optax.sgd(0.1)).fit(batches(2), epochs=1).history.last("train/loss") > 0


def test_summary_counts_and_bytes():
    trainer = NetTrainer(Net(), optax.adam(1e-2), callbacks=[tk.callbacks.EMA(0.9)])
    trainer.init(batches(1)[0])
    text = trainer.summary()
    count = sum(leaf.size for leaf in jax.tree.leaves(trainer.state.params))
    assert "Dense_0/kernel" in text
    assert f"{count:,} values" in text
    assert f"{4 * count:,} bytes" in text
    assert "hooks/ema" in text


def test_a_history_takes_16_bytes_a_value_and_lets_the_oldest_go(monkeypatch):
    monkeypatch.setattr(history_module, "_MOST_VALUES", 100)
    history = history_module.History()
    for step in range(1, 1001):
        history.append(step, {"train/loss": 1 / step})
        assert len(history["train/loss"]) <= 100
    kept = history["train/loss"]
    assert kept == [(step, 1 / step) for step in range(1001 - len(kept), 1001)]
    assert len(kept) >= 75
    saved = history.state_dict()["train/loss"]
    assert saved["steps"].nbytes + saved["values"].nbytes == 16 * len(kept)
