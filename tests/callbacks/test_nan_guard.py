"""`NanGuard` against loops written by hand that leave the bad batches out, and what it says of them."""

import logging
import pickle

import clu.metrics
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import trainkit as tk
from tests.helpers.compare import assert_same
from tests.helpers.digits import Net, NetTrainer, batches
from tests.helpers.infos import Recorder, make_info
from trainkit._core.state import TrainState
from trainkit._step import guard
from trainkit.callbacks import EMA, NanGuard, Phase
from trainkit.callbacks._callback import Rollback
from trainkit.hooks import NanGuardState

EACH = tk.Every(steps=1)
DECAY = 0.9
STRATEGIES = {
    "jit": lambda: tk.parallel.Mesh(devices=jax.devices()[:1]),
    "vmap": lambda: tk.parallel.PerExample(devices=jax.devices()[:1]),
    "pmap": lambda: tk.parallel.Pmap(devices=jax.devices()[:1]),
}


def with_bad(count, *bad, rows=16):
    """Batches of which those at the places `bad` hold one number that is not one."""
    data = batches(count, rows=rows)
    for index in bad:
        data[index]["x"][3, 2] = np.nan
    return data


def by_hand(model, tx, state, data, *, bad):
    """Trains on all of `data` but the places `bad`, which count in the numbers of the steps and of their keys."""

    @jax.jit
    def step(params, stats, opt_state, ema, batch, key):
        def loss(params):
            variables = {"params": params, **({"batch_stats": stats} if stats else {})}
            logits, updated = model.apply(
                variables, batch["x"], train=True, rngs=key, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
            return losses.mean(), updated.get("batch_stats", {})

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        ema = jax.tree.map(lambda old, new: DECAY * old + (1 - DECAY) * new, ema, params)
        return params, stats, opt_state, ema, value

    carry = (state.params, state.batch_stats, state.opt_state, state.params)
    values = []
    for index, batch in enumerate(data):
        if index not in bad:
            *carry, value = step(*carry, batch, jax.random.fold_in(state.rng, index))
            values.append(float(value))
    return *carry, values


# Skipping -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["chosen by bits", "moved in place"])
def settled(request, monkeypatch):
    """Either way in which a state is settled: small ones are chosen, large ones moved."""
    if request.param == "moved in place":
        monkeypatch.setattr(guard, "_SMALL_STATE", 0)


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("bad", [(4,), (0, 1, 7), (9,), ()])
def test_skip_equals_a_loop_that_leaves_the_bad_batches_out(bad):
    model, tx, data = Net(), optax.adam(1e-2), with_bad(10, *bad)
    trainer = NetTrainer(model, tx, callbacks=[NanGuard("skip"), EMA(DECAY)])
    start = jax.device_get(trainer.init(data[0]))
    result = trainer.fit(data, epochs=1)
    params, stats, opt_state, ema, values = by_hand(model, tx, start, data, bad=bad)
    close = {"rtol": 1e-5, "atol": 1e-6}
    assert_same(result.state.params, params, **close)
    assert_same(result.state.batch_stats, stats, **close)
    assert_same(result.state.opt_state, opt_state, **close)
    assert_same(result.state.hooks["ema"].params, ema, **close)
    assert int(result.state.hooks["ema"].count) == 10 - len(bad)
    # The steps go on counting, and the metrics are those of the good ones.
    assert result.step == int(result.state.step) == 10
    assert result.history["train/loss"] == [(10, pytest.approx(np.mean(values), rel=1e-5))]


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_skip_under_every_strategy(strategy, accumulate):
    # One example a step would be told apart by its key; without dropout all strategies compute the same.
    model, tx = Net(rate=0.0, axis_name=None if strategy == "jit" else "batch"), optax.adam(1e-2)
    data = with_bad(8, 5)
    trainer = NetTrainer(
        model, tx, strategy=STRATEGIES[strategy](), accumulate=accumulate, callbacks=[NanGuard("skip", EACH)]
    )
    before = jax.device_get(trainer.fit(data[:4], epochs=1).state)
    skipped = trainer.fit(data[4:6], epochs=1)
    if accumulate == 2:  # one update, of which one batch is bad
        assert_same(jax.device_get(skipped.state.params), before.params)
        assert_same(jax.device_get(skipped.state.batch_stats), before.batch_stats)
        assert_same(jax.device_get(skipped.state.opt_state), before.opt_state)
    after = trainer.fit(data[6:], epochs=1)
    assert int(after.state.hooks["nan_guard"].skipped) == 1
    assert after.step == 8 // accumulate
    assert [value for _, value in after.history["skipped_steps"]] == [1]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(after.state.params)))


def test_the_count_is_written_where_it_has_changed_and_the_last_step_named(caplog):
    trainer = NetTrainer(Net(), optax.sgd(0.1), callbacks=[NanGuard("skip", tk.Every(steps=2))])
    with caplog.at_level(logging.WARNING, "trainkit"):
        history = trainer.fit(with_bad(12, 2, 3, 7, 11), epochs=1).history
    assert history["skipped_steps"] == [(4, 2), (8, 3), (12, 4)]
    told = [record.getMessage() for record in caplog.records]
    assert told[0] == "2 updates were skipped so far because they were not finite, the last at step 4 (loss)."
    assert len(told) == 3


def test_where_nothing_is_skipped_nothing_is_written():
    trainer = NetTrainer(Net(), optax.sgd(0.1), callbacks=[NanGuard("skip", EACH)])
    assert "skipped_steps" not in trainer.fit(batches(4), epochs=1).history


def test_a_step_set_back_does_not_meet_its_old_number():
    trainer = NetTrainer(Net(), optax.sgd(0.1), callbacks=[NanGuard("skip")])
    state = trainer.fit(with_bad(3, 2), epochs=1).state
    trainer.state = state.replace(step=jnp.zeros((), jnp.int32))
    after = trainer.fit(batches(3), epochs=1)
    assert int(after.state.hooks["nan_guard"].skipped) == 1


# Raising ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("every", [1, 3, 50])
def test_raise_names_step_and_leaf_and_keeps_the_state_before(accumulate, every):
    data, tx = with_bad(12, 6), optax.adam(1e-2)
    clean = NetTrainer(Net(), tx, accumulate=accumulate, callbacks=[NanGuard(), EMA(DECAY)])
    before = jax.device_get(clean.fit(data[:6], epochs=1).state)
    guard = NanGuard("raise", tk.Every(steps=every))
    trainer = NetTrainer(Net(), tx, accumulate=accumulate, callbacks=[guard, EMA(DECAY)])
    bad_step = 6 // accumulate + 1
    with pytest.raises(
        tk.NonFiniteError, match=rf"step {bad_step} is not finite, and loss.*replay\(step="
    ) as e:
        trainer.fit(data, epochs=1)
    assert (e.value.step, e.value.leaf) == (bad_step, "loss")
    state = jax.device_get(trainer.state)
    for name in ("params", "opt_state", "batch_stats"):
        assert_same(getattr(state, name), getattr(before, name))
    assert_same(state.hooks["ema"], before.hooks["ema"])
    # Looked at one interval late, or at the end.
    ends = 12 // accumulate
    assert int(state.step) == min(-(-bad_step // every) * every + every, ends)


def test_a_fit_after_one_that_raised_goes_on(caplog):
    data = with_bad(6, 2)
    trainer = NetTrainer(Net(), optax.sgd(0.1), callbacks=[NanGuard()])
    with pytest.raises(tk.NonFiniteError):
        trainer.fit(data, epochs=1)
    kept = jax.device_get(trainer.state.params)
    with caplog.at_level(logging.WARNING, "trainkit"):
        after = trainer.fit(batches(2, seed=3), epochs=1)
    assert "refused from step 3 on, whose loss was not finite" in caplog.text
    assert int(after.state.hooks["nan_guard"].bad_step) == 0
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), kept, jax.device_get(after.state.params))
    assert changed["Dense_0"]["kernel"]


def test_an_evaluation_is_not_reached():
    trainer = NetTrainer(Net(), optax.sgd(0.1), callbacks=[NanGuard()])
    with pytest.raises(tk.NonFiniteError):
        trainer.fit(with_bad(4, 2), epochs=1, eval_data=batches(1))
    assert "eval/loss" not in trainer.history


def test_another_exception_does_not_hide_a_bad_step():
    def source():
        yield from with_bad(4, 1)
        raise OSError("disk")

    for action, note in (("raise", "NonFiniteError(2, 'loss')"), ("rollback", "step 2 is not finite")):
        trainer = NetTrainer(Net(), optax.sgd(0.1), callbacks=[NanGuard(action)])
        with pytest.raises(OSError, match="disk") as caught:
            trainer.fit(source, epochs=1)
        (told,) = caught.value.__notes__
        assert note in told


def test_the_error_is_pickled_whole():
    error = pickle.loads(pickle.dumps(tk.NonFiniteError(7, "grads/w")))
    assert (error.step, error.leaf, type(error)) == (7, "grads/w", tk.NonFiniteError)
    assert isinstance(error, FloatingPointError)


# What is checked ----------------------------------------------------------------------------------------------


@flax.struct.dataclass
class Seen(clu.metrics.Collection):
    seen: clu.metrics.Average.from_output("seen")


class Root(nn.Module):
    """`sqrt` of a product: finite at 0, with a gradient that is not."""

    @nn.compact
    def __call__(self, x):
        return jnp.sqrt(nn.Dense(1, use_bias=False, name="body")(x))[:, 0]


class RootTrainer(tk.Trainer):
    def loss(self, model, batch, ctx):
        return model(batch), {}


def test_a_gradient_alone():
    trainer = RootTrainer(Root(), optax.sgd(0.1), callbacks=[NanGuard()])
    trainer.init(np.ones((4, 2), np.float32))
    trainer.state = trainer.state.replace(params={"body": {"kernel": jnp.ones((2, 1))}})
    good, bad = np.ones((4, 2), np.float32), np.zeros((4, 2), np.float32)
    with pytest.raises(tk.NonFiniteError) as caught:
        trainer.fit([good, good, bad], epochs=1)
    assert (caught.value.step, caught.value.leaf) == (3, "grads/body/kernel")


class Observed(nn.Module):
    """Keeps the least number seen, which starts at infinity, and the largest reciprocal."""

    @nn.compact
    def __call__(self, x, train):
        least = self.variable("seen", "least", lambda: jnp.full((), jnp.inf))
        most = self.variable("seen", "most", lambda: jnp.zeros(()))
        mask = self.variable("seen", "fixed", lambda: jnp.full((2,), -jnp.inf))
        if train:
            least.value = jnp.minimum(least.value, x.min())
            most.value = jnp.maximum(most.value, (1 / x).max())
        return nn.Dense(1)(x)[:, 0] + jnp.where(jnp.isinf(mask.value), 0.0, 1.0).sum()


class ObservedTrainer(tk.Trainer):
    def loss(self, model, batch, ctx):
        return model(batch, ctx.train) ** 2, {}


def test_model_state_that_turns_but_not_what_was_infinite_before():
    data = [np.full((4, 2), value, np.float32) for value in (2, 1, 0, 3)]
    trainer = ObservedTrainer(Observed(), optax.sgd(0.01), callbacks=[NanGuard("raise", EACH)])
    with pytest.raises(tk.NonFiniteError) as caught:
        trainer.fit(data, epochs=1)
    assert (caught.value.step, caught.value.leaf) == (3, "seen/most")
    kept = jax.device_get(trainer.state.collections["seen"])
    assert (kept["least"], kept["most"]) == (1, 1)


class Own(tk.Trainer):
    """A step of its own, whose parameters are lost with the first batch that is."""

    says_loss = True

    def loss(self, model, batch, ctx):
        return model(batch["x"], train=ctx.train).sum(axis=-1), {"seen": batch["x"]}

    def train_step(self, state, batch):
        params = jax.tree.map(lambda p: p + 0 * batch["x"].sum(), state.params)
        outputs = {"loss": jnp.zeros(len(batch["y"]))} if self.says_loss else {}
        return state.replace(params=params), {"seen": jnp.zeros(len(batch["y"])), **outputs}


class Silent(Own):
    says_loss = False
    metrics = Seen


@pytest.mark.parametrize("kind", [Own, Silent])
def test_a_step_of_ones_own_is_checked_by_its_parameters(kind):
    trainer = kind(Net(norm=False), optax.sgd(0.1), callbacks=[NanGuard()])
    before = jax.device_get(trainer.init(batches(1)[0]).params)
    with pytest.raises(tk.NonFiniteError) as caught:
        trainer.fit(with_bad(5, 3), epochs=1)
    assert (caught.value.step, caught.value.leaf) == (4, "params/Dense_0/bias")
    assert_same(jax.device_get(trainer.state.params), before)


def test_overflow_in_float16_is_left_to_the_loss_scale():
    good = batches(1)[0]
    trainer = NetTrainer(
        Net(norm=False, rate=0.0), optax.sgd(0.1), precision="float16", callbacks=[NanGuard(every=EACH)]
    )
    state = trainer.init(good)
    scale = state.hooks["loss_scale"].replace(scale=jnp.asarray(2.0**30))
    trainer.state = state.replace(hooks={**state.hooks, "loss_scale": scale})
    after = trainer.fit([good], steps=1)
    assert int(after.state.hooks["loss_scale"].skipped) == 1
    assert int(after.state.hooks["nan_guard"].skipped) == 0
    # A loss that is not finite is no matter of scale.
    with pytest.raises(tk.NonFiniteError, match="loss is the first"):
        trainer.fit(with_bad(2, 0), epochs=1)
    assert float(trainer.state.hooks["loss_scale"].scale) == 2.0**29


# What is returned, remembered and refused ---------------------------------------------------------------------


def guarded_state(*record):
    tx = optax.sgd(0.1)
    state = TrainState.create(apply_fn=None, params={"w": jnp.ones(())}, tx=tx)
    return state.replace(hooks={"nan_guard": NanGuardState(jnp.asarray(record, jnp.int32))})


def test_rollback_is_returned_one_interval_late_and_at_once_before_an_evaluation():
    guard = NanGuard("rollback", EACH)
    assert guard.on_fit_start(make_info(state=guarded_state(0, 0, 0))) is None
    assert guard.on_step(make_info(10, state=guarded_state(0, 0, 0))) is None
    assert guard.on_step(make_info(20, state=guarded_state(17, 1, 4))) is None
    expected = Rollback("step 17 is not finite, and grads/w is the first leaf that is not")
    assert guard.on_step(make_info(30, state=guarded_state(17, 1, 14))) == expected
    guard.load_state_dict({"written": 0})
    assert guard.on_step(make_info(20, state=guarded_state(0, 0, 0))) is None
    assert guard.on_eval_start(make_info(25, state=guarded_state(22, 0, 4))) == Rollback(
        "step 22 is not finite, and loss is the first leaf that is not"
    )
    assert guard.on_fit_end(make_info(25, state=guarded_state(0, 0, 4))) is None


def test_the_count_written_survives_a_resume():
    writer = Recorder()
    first = NanGuard("skip", EACH)
    first.on_fit_start(make_info(writer=writer, state=guarded_state(0, 0, 0)))
    first.on_step(make_info(10, state=guarded_state(7, 0, 2)))
    kept = first.state_dict()  # as a checkpoint asks, which flushes
    assert writer.rows == [(10, {"skipped_steps": 2.0})]
    second = NanGuard("skip", EACH)
    second.load_state_dict(kept)
    second.on_fit_start(make_info(10, writer=writer, state=guarded_state(7, 0, 2)))
    second.on_step(make_info(20, state=guarded_state(7, 0, 2)))
    second.on_fit_end(make_info(20, state=guarded_state(7, 0, 2)))
    assert len(writer.rows) == 1


def test_arguments():
    with pytest.raises(ValueError, match=r"action='stop'.*'raise', 'skip', 'rollback'"):
        NanGuard("stop")
    with pytest.raises(TypeError, match="every"):
        NanGuard("skip", 50)
    assert NanGuard.phase == Phase.GUARD
