"""Accumulated gradients, precision and rematerialisation, against the plain step and hand-written ones."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainkit as tk
from tests.helpers.compare import assert_same
from tests.helpers.digits import Net, NetTrainer, arrays, batches


def joined(parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("clip", [False, True])
def test_accumulated_gradients_are_those_of_the_joined_batch(clip):
    tx = optax.sgd(0.1)
    tx = optax.chain(optax.clip_by_global_norm(0.05), tx) if clip else tx
    parts = [*batches(4, rows=8), *batches(2, rows=8, seed=1)]
    model = Net(norm=False, rate=0.0)
    small = NetTrainer(model, tx, accumulate=2, callbacks=[tk.callbacks.EMA(0.9)]).fit(parts, epochs=2)
    large = NetTrainer(model, tx, callbacks=[tk.callbacks.EMA(0.9)]).fit(
        [joined(parts[index : index + 2]) for index in (0, 2, 4)], epochs=2
    )
    assert small.step == large.step == 6
    assert_same(small.state.params, large.state.params, rtol=1e-5, atol=1e-6)
    assert_same(small.state.hooks["ema"].params, large.state.hooks["ema"].params, rtol=1e-5, atol=1e-6)
    assert small.history.last("train/loss") == pytest.approx(large.history.last("train/loss"), rel=1e-5)


def test_a_short_tail_is_one_update_rightly_weighted():
    data = arrays(28)
    model, tx = Net(norm=False, rate=0.0), optax.sgd(0.1)
    # Batches of 8, 8, 8 and 4 rows, by threes: one update of 24 rows and one of 4.
    got = NetTrainer(model, tx, accumulate=3).fit(tk.data.Arrays(data, batch_size=8), epochs=2)
    first, last = ({name: value[part] for name, value in data.items()} for part in (slice(24), slice(24, 28)))
    expected = NetTrainer(model, tx).fit([first, last], epochs=2)
    assert got.step == expected.step == 4
    assert_same(got.state.params, expected.state.params, rtol=1e-5, atol=1e-6)
    # A joint mask: 12 rows in batches of 8 and 4 are one mean over 12, not a mean of two means.
    twelve = arrays(12, seed=3)
    got = NetTrainer(model, tx, accumulate=2).fit(tk.data.Arrays(twelve, batch_size=8), epochs=3)
    assert_same(
        got.state.params, NetTrainer(model, tx).fit([twelve], epochs=3).state.params, rtol=1e-5, atol=1e-6
    )


def test_batch_statistics_go_through_the_micro_batches_in_order():
    parts, model, tx = batches(2, rows=8), Net(rate=0.0), optax.sgd(0.0)
    got = NetTrainer(model, tx, accumulate=2).fit(parts, epochs=1)
    assert got.step == 1
    one_by_one = NetTrainer(model, tx).fit(parts, epochs=1)
    assert_same(got.state.batch_stats, one_by_one.state.batch_stats, rtol=1e-6, atol=1e-7)


def test_accumulation_and_a_step_of_ones_own_exclude_each_other():
    class Own(NetTrainer):
        def train_step(self, state, batch):
            return super().train_step(state, batch)

    with pytest.raises(ValueError, match="accumulate=2 needs"):
        Own(Net(), optax.sgd(0.1), accumulate=2)
    with pytest.raises(ValueError, match="accumulate=0"):
        NetTrainer(Net(), optax.sgd(0.1), accumulate=0)


class Watched(NetTrainer):
    """Notes the dtypes that its loss sees, and those within the model."""

    def loss(self, model, batch, ctx):
        def look(method, args, kwargs, context):
            if isinstance(context.module, nn.Dense) and not model.is_initializing():
                self.inside = {args[0].dtype, context.module.variables["params"]["kernel"].dtype}
            return method(*args, **kwargs)

        with nn.intercept_methods(look):
            losses, outputs = super().loss(model, batch, ctx)
        self.seen = {
            "logits": outputs["logits"].dtype,
            "kernel": model.variables["params"]["Dense_0"]["kernel"].dtype,
            "params": ctx.params["Dense_0"]["kernel"].dtype if ctx.params else jnp.float32,
            "stats": model.variables["batch_stats"]["BatchNorm_0"]["mean"].dtype,
        }
        return losses, outputs


@pytest.mark.parametrize(("precision", "compute"), [("bfloat16", jnp.bfloat16), ("float16", jnp.float16)])
def test_precision_policy(precision, compute):
    data = [arrays()] * 2
    trainer = Watched(Net(rate=0.0), optax.adam(1e-2), precision=precision)
    result = trainer.fit(data, epochs=10)
    assert trainer.seen == {
        "logits": jnp.float32,
        "kernel": jnp.float32,
        "params": jnp.float32,
        "stats": jnp.float32,
    }
    assert trainer.inside == {jnp.dtype(compute)}
    assert {leaf.dtype for leaf in jax.tree.leaves(result.state.params)} == {jnp.dtype("float32")}
    plain = NetTrainer(Net(rate=0.0), optax.adam(1e-2)).fit(data, epochs=10)
    # Sixteen bits of mantissa less: close, and not the same program.
    assert result.history.last("train/loss") == pytest.approx(plain.history.last("train/loss"), rel=0.05)
    assert result.history.last("train/loss") != plain.history.last("train/loss")


def test_float16_skips_an_update_that_overflows_and_counts_it():
    good, bad = arrays(16), {**arrays(16), "x": np.full((16, 8), 1e6, np.float32)}
    log = tk.callbacks.LogMetrics(every=tk.Every(steps=1))
    trainer = NetTrainer(Net(norm=False, rate=0.0), optax.sgd(0.1), precision="float16", callbacks=[log])
    before = jax.device_get(trainer.fit([good], steps=1).state)
    after = trainer.fit([bad], steps=1)
    assert_same(jax.device_get(after.state.params), before.params)
    assert_same(jax.device_get(after.state.opt_state), before.opt_state)
    assert int(after.state.hooks["loss_scale"].skipped) == 1
    assert float(after.state.hooks["loss_scale"].scale) == float(before.hooks["loss_scale"].scale) / 2
    assert [value for _, value in after.history["train/skipped_updates"]] == [0, 1]
    assert after.step == 2


class Penalised(tk.Trainer):
    """An L2 penalty, written in each of the ways there are."""

    way = "ctx"

    def loss(self, model, batch, ctx):
        y = model(batch["x"])
        params = {
            "ctx": ctx.params,
            "variables": model.variables["params"],
            "unbound": model.unbind()[1]["params"],
        }
        penalty = sum((leaf**2).sum() for leaf in jax.tree.leaves(params[self.way]))
        return (y**2).mean(-1) + penalty, {}


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("way", ["ctx", "variables", "unbound"])
def test_a_penalty_is_as_exact_under_half_precision_as_without(precision, way):
    class Way(Penalised):
        pass

    Way.way = way
    # 70,000 ones: their sum is beyond float16, and beyond what bfloat16 counts.
    wide = nn.Dense(700, use_bias=False, kernel_init=nn.initializers.ones)
    trainer = Way(wide, optax.sgd(1e-3), precision=precision)
    result = trainer.fit([{"x": np.zeros((2, 100), np.float32)}], steps=1)
    assert result.history.last("train/loss") == 70_000
    assert_same(result.state.params, {"kernel": np.full((100, 700), 1 - 2e-3, np.float32)}, rtol=1e-6)
    assert trainer.evaluate([{"x": np.zeros((2, 100), np.float32)}])["loss"] == pytest.approx(
        70_000 * (1 - 2e-3) ** 2, rel=1e-5
    )


class Parts(nn.Module):
    """A parameter made in `setup`, a part called on its own, and a variable that is carried."""

    def setup(self):
        self.part, self.seen = nn.Dense(3), []
        self.gain = self.param("gain", nn.initializers.ones, (1, 3))
        self.mean = self.variable("memory", "mean", jnp.zeros, (3,))

    def __call__(self, x):
        y = self.part(x) * self.gain
        if not self.is_initializing() and self.is_mutable_collection("memory"):
            self.mean.value = y.mean(0)
        return y


def test_every_way_into_a_model_computes_in_half_precision_and_what_is_carried_stays_float32():
    seen = {}

    class Ways(tk.Trainer):
        def loss(self, model, batch, ctx):
            x = batch["x"]
            if model.is_initializing():
                model(x)
            module, variables = model.unbind()
            seen["unbound"] = variables["params"]["gain"].dtype

            def look(method, args, kwargs, context):
                result = method(*args, **kwargs)
                if ctx.train and not model.is_initializing() and context.method_name == "__call__":
                    seen.setdefault(type(context.module).__name__, set()).add(str(result.dtype))
                return result

            results = [model(x), model.part(x), module.apply(variables, x)]
            with nn.intercept_methods(look):
                model(x), model.part(x), module.apply(variables, x)
            seen["returned"] = {str(result.dtype) for result in results}
            return sum((result**2).mean(-1) for result in results), {}

    x = np.ones((2, 3), np.float32)
    result = Ways(Parts(), optax.sgd(0.1), precision="bfloat16").fit([{"x": x}], steps=2)
    assert seen == {
        "unbound": jnp.float32,
        "returned": {"float32"},
        "Parts": {"bfloat16"},
        "Dense": {"bfloat16"},
    }
    assert result.state.collections["memory"]["mean"].dtype == jnp.float32


class OwnStep(NetTrainer):
    def train_step(self, state, batch):
        return state.apply_gradients(grads=jax.tree.map(jnp.zeros_like, state.params)), {
            "loss": jnp.zeros(())
        }


class ThroughDefault(NetTrainer):
    def train_step(self, state, batch):
        return super().train_step(state, batch)


@pytest.mark.parametrize("setting", [{"precision": "bfloat16"}, {"remat": True}])
def test_a_setting_that_an_own_train_step_never_reaches_is_refused(setting):
    name = next(iter(setting))
    with pytest.raises(ValueError, match=rf"{name}=.* has its own, which does not call it.*leave {name} out"):
        OwnStep(Net(), optax.sgd(0.1), **setting).fit(batches(1), steps=1)
    kept = ThroughDefault(Net(), optax.sgd(0.1), **setting).fit(batches(1), steps=1)
    assert_same(
        kept.state.params, NetTrainer(Net(), optax.sgd(0.1), **setting).fit(batches(1), steps=1).state.params
    )


def test_the_share_of_skipped_updates_counts_updates_and_not_micro_batches():
    good, bad = arrays(16), {**arrays(16), "x": np.full((16, 8), 1e6, np.float32)}
    log = tk.callbacks.LogMetrics(every=tk.Every(steps=4))
    model = Net(norm=False, rate=0.0)
    trainer = NetTrainer(model, optax.sgd(0.1), precision="float16", accumulate=3, callbacks=[log])
    # Four updates, the last of one batch, which overflows.
    result = trainer.fit([good] * 9 + [bad], epochs=1)
    assert result.history["train/skipped_updates"] == [(4, 0.25)]


def test_unknown_precision():
    with pytest.raises(ValueError, match=r"precision='fp8'.*'bfloat16'"):
        NetTrainer(Net(), optax.sgd(0.1), precision="fp8")


@pytest.mark.parametrize("remat", [True, jax.checkpoint_policies.dots_saveable])
def test_remat_changes_memory_not_numbers(remat):
    data = batches(3)
    plain = NetTrainer(Net(), optax.adam(1e-2)).fit(data, epochs=2)
    again = NetTrainer(Net(), optax.adam(1e-2), remat=remat).fit(data, epochs=2)
    assert_same(again.state.params, plain.state.params, rtol=1e-5, atol=1e-6)
    assert_same(again.state.batch_stats, plain.state.batch_stats, rtol=1e-5, atol=1e-6)
