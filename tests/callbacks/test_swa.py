"""`SWA` against means and variances that NumPy takes of what the run went through."""

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn

import trainkit as tk
from tests.helpers.compare import assert_same
from trainkit.callbacks import EMA, SWA, Checkpoint, Lambda


class Net(nn.Module):
    """What the normalisation sees is `x @ kernel + bias`, whatever is dropped."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(1)(nn.relu(x))[:, 0]


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(1)(nn.relu(nn.Dense(4)(x)))[:, 0]


class Squares(tk.Trainer):
    def loss(self, model, batch, ctx):
        return (model(batch["x"], ctx.train) - batch["y"]) ** 2, {}


def batches(*sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"x": rng.normal(1, 2, (n, 3)).astype(np.float32), "y": rng.normal(size=n).astype(np.float32)}
        for n in sizes
    ]


DATA, OTHERS = batches(6, 6, 6), batches(5, 7, 2, seed=1)


def keeping(seen):
    """A callback that keeps the parameters after every update."""
    return Lambda(on_step=lambda info: seen.append(jax.device_get(info.state.params)))


def mean_of(trees):
    return jax.tree.map(lambda *leaves: np.mean(np.stack(leaves, dtype=np.float64), 0), *trees)


def as_floats(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def statistics_of(params, data):
    """What one pass over `data` gives the normalisation: mean and variance of all its rows."""
    x = np.concatenate([batch["x"] for batch in data]).astype(np.float64)
    seen = x @ np.asarray(params["Dense_0"]["kernel"], np.float64) + np.asarray(params["Dense_0"]["bias"])
    return {"BatchNorm_0": {"mean": seen.mean(0), "var": seen.var(0)}}


@pytest.mark.parametrize(
    "options", [{}, {"accumulate": 2}, {"steps_per_call": 3}, {"strategy": "vmap"}, {"strategy": "pmap"}]
)
def test_the_mean_of_the_parameters_after_every_second_update_from_the_third_on(options):
    seen = []
    if options.get("strategy") == "vmap":
        model, loss = (
            Plain(),
            lambda self, model, batch, ctx: (
                (model(batch["x"][None], ctx.train)[0] - batch["y"]) ** 2,
                {},
            ),
        )
    else:
        model, loss = Plain(), Squares.loss
    made = type("Made", (tk.Trainer,), {"loss": loss})(
        model, optax.adam(0.05), callbacks=[SWA(3, 2), keeping(seen)], **options
    )
    assert made.fit(DATA * 2, steps=2).state.hooks["swa"].count == 0
    assert made.evaluate(DATA) == made.evaluate(DATA, weights="live")
    assert_same(SWA.view(made.state).params, made.state.params)
    state = made.fit(DATA * 2, steps=6).state
    taken = [seen[step - 1] for step in (3, 5, 7)]
    assert int(state.hooks["swa"].count) == 3
    assert_same(as_floats(SWA.view(state).params), mean_of(taken), rtol=1e-5, atol=1e-6)
    assert_same(state.params, jax.tree.map(jax.numpy.asarray, seen[-1]))


def test_statistics_of_the_mean_over_all_rows_of_unequal_batches():
    passes = []

    def source():
        passes.append(1)
        return iter(OTHERS)

    told = []
    asks = Lambda(
        every=tk.Every(steps=5),
        on_step=lambda info: told.append(
            (info.evaluate(DATA), info.evaluate(DATA, weights="live"), len(passes))
        ),
    )
    made = Squares(Net(), optax.sgd(0.05), callbacks=[SWA(4, refresh=source), asks])
    result = made.fit(DATA, steps=6, eval_data=DATA, eval_every=tk.At(steps=(2, 4)))
    # At 2 there is no mean yet; at 4, at 5 for the question, and for the end there is a new one.
    assert told[0][2] == 2
    assert len(passes) == 3
    memory, shown = result.state.hooks["swa"], SWA.view(result.state)
    assert int(memory.refreshed) == int(memory.count) == 3
    expected = statistics_of(shown.params, OTHERS)
    assert_same(as_floats(shown.batch_stats), expected, rtol=2e-6, atol=2e-7)
    # What is evaluated are these, by hand.
    by_hand = Squares(Net(), optax.sgd(0.05))
    by_hand.state = shown.replace(hooks={})
    assert made.evaluate(DATA) == by_hand.evaluate(DATA) != made.evaluate(DATA, weights="live")
    assert len(passes) == 3
    # The live ones are those that the training left.
    plain = Squares(Net(), optax.sgd(0.05)).fit(DATA, steps=6).state
    assert_same(result.state.batch_stats, plain.batch_stats)
    assert_same(result.state.params, plain.params)
    # Statistics of an earlier mean are nobody's.
    older = result.state.replace(hooks={"swa": memory.replace(count=memory.count + 1)})
    assert_same(SWA.view(older).batch_stats, older.batch_stats)


def run(logdir, *callbacks, steps=8, resume=True):
    keeper = Checkpoint(tk.Every(steps=2))
    made = Squares(
        Net(), optax.adam(0.05), callbacks=[SWA(2, 2, refresh=OTHERS), keeper, *callbacks], logdir=logdir
    )
    result = made.fit(DATA, steps=steps, eval_data=DATA, eval_every=tk.Every(steps=3), resume=resume)
    return made, result


def test_a_run_that_was_broken_off_ends_as_one_that_was_not(tmp_path):
    def dies(info):
        if info.step == 7:
            raise ConnectionError

    with pytest.raises(ConnectionError):
        run(tmp_path / "a", Lambda(on_step=dies))
    resumed, whole = run(tmp_path / "a")[1], run(tmp_path / "b")[1]
    assert_same(resumed.state, whole.state.replace(tx=resumed.state.tx, apply_fn=resumed.state.apply_fn))
    assert dict(resumed.history) == dict(whole.history)
    # The last checkpoint holds the statistics of the end: nothing is to be passed over to look at it.
    looks = Squares(Net(), optax.adam(0.05), callbacks=[SWA(2, 2, refresh=OTHERS)])
    looks.restore(tmp_path / "a")
    memory = looks.state.hooks["swa"]
    assert int(memory.refreshed) == int(memory.count) == 4
    # Without the callback the checkpoint is of another trainer, and a state by hand is what it is.
    without = Squares(Net(), optax.adam(0.05))
    without.state = looks.state
    assert without.evaluate(DATA) == looks.evaluate(DATA, weights="live")


def test_it_is_chosen_by_name_or_place():
    made = Squares(Plain(), optax.sgd(0.05), callbacks=[SWA(1), EMA(0.5), EMA(0.9, name="slow")])
    state = made.fit(DATA, steps=3).state
    for weights, params in {
        "averaged": SWA.view(state).params,
        "swa": SWA.view(state).params,
        "ema": EMA.view(state).params,
        "slow": EMA.view(state, "slow").params,
        "live": state.params,
    }.items():
        got = made.apply(_params, weights=weights)
        assert_same(got, params)
    with pytest.raises(ValueError, match=r"weights='fast': .*'live', 'swa', 'ema', 'slow'"):
        made.evaluate(DATA, weights="fast")


def _params(model):
    return model.variables["params"]


def test_halves_are_summed_in_float32_and_integers_taken_as_they_are():
    from trainkit.hooks._hook import StepValues
    from trainkit.hooks._swa import swa_hook, view

    params = {"table": jax.numpy.arange(3), "w": jax.numpy.ones(3, jax.numpy.bfloat16)}
    state = tk.TrainState.create(apply_fn=None, params=params, tx=optax.identity())
    hook = swa_hook("swa", 1, 1, batch_stats=False)
    memory, update = hook.init(state), jax.jit(hook.update)
    for step in range(1, 301):
        now = {"table": params["table"] + step, "w": params["w"] * (1 + step % 2)}
        state = state.replace(params=now, step=jax.numpy.int32(step))
        memory = update(memory, StepValues(state, jax.numpy.zeros(()), None))
    assert_same(memory.params["table"], params["table"] + 300)
    np.testing.assert_allclose(memory.params["w"], 1.5, rtol=1e-5)
    assert view(state, memory).params["w"].dtype == jax.numpy.bfloat16


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0,), {}, ValueError, r"SWA\(start=0\): must be an int, 1 or more; it is the number of an update"),
        ((5, 0), {}, ValueError, r"SWA\(every=0\)"),
        ((5.0,), {}, ValueError, r"SWA\(start=5\.0\)"),
        ((5,), {"refresh": 3}, TypeError, "int"),
    ],
)
def test_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        SWA(*arguments, **options)


def test_what_has_no_statistics_has_none_to_refresh():
    made = Squares(Plain(), optax.sgd(0.1), callbacks=[SWA(1, refresh=DATA)])
    with pytest.raises(ValueError, match=r"refresh=\.\.\.\) estimates .* keeps none: leave refresh out"):
        made.fit(DATA, steps=1)
    with pytest.raises(ValueError, match=r"no mean named 'other'.*tk\.callbacks\.SWA"):
        SWA.view(made.state, "other")
    with pytest.raises(ValueError, match=r"two callbacks keep state under state\.hooks\['swa'\]"):
        Squares(Plain(), optax.sgd(0.1), callbacks=[SWA(1), SWA(2)])
