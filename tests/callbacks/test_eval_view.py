"""`EvalView`, and the one protocol by which weights are chosen, against optax and by hand."""

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn

import trainkit as tk
from tests.helpers.compare import assert_same
from trainkit.callbacks import EMA, Callback, EvalView
from trainkit.hooks import View

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
DATA = [{"x": X, "y": X.sum(1)}]


class Line(tk.Trainer):
    def loss(self, model, batch, ctx):
        return (model(batch["x"])[:, 0] - batch["y"]) ** 2, {}

    def predict_step(self, model, batch, ctx):
        return model(batch["x"])[:, 0]


def schedule_free(state):
    params = optax.contrib.schedule_free_eval_params(state.opt_state, state.params)
    return state.replace(params=params)


def test_a_schedule_free_optimizer_is_evaluated_at_its_own_parameters(tmp_path):
    traced = []

    def fn(state):
        traced.append(1)
        return schedule_free(state)

    made = Line(nn.Dense(1), optax.contrib.schedule_free_sgd(0.1), callbacks=[EvalView(fn)])
    result = made.fit(DATA, steps=9, eval_data=DATA, eval_every=tk.Every(steps=3))
    state = result.state
    params = optax.contrib.schedule_free_eval_params(state.opt_state, state.params)
    expected = X @ np.asarray(params["kernel"])[:, 0] + np.asarray(params["bias"])[0]
    np.testing.assert_allclose(made.predict(DATA), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(made.evaluate(DATA)["loss"], np.mean((expected - X.sum(1)) ** 2), rtol=1e-5)
    assert result.history["eval/loss"][-1][1] == made.evaluate(DATA, weights="eval_view")["loss"]
    live = X @ np.asarray(state.params["kernel"])[:, 0] + np.asarray(state.params["bias"])[0]
    np.testing.assert_allclose(made.predict(DATA, weights="live"), live, rtol=1e-5, atol=1e-6)
    assert np.abs(live - expected).max() > 1e-3
    assert traced == [1]
    for weights, wanted in {"averaged": expected, "eval_view": expected, "live": live}.items():
        tk.export.save(tmp_path / weights, made, {"x": X}, weights=weights, platforms=("cpu",))
        got = tk.export.load(tmp_path / weights)({"x": X})
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"weights='best': .*'live', 'eval_view'"):
        tk.export.save(tmp_path / "best", made, {"x": X}, weights="best")


class Nothing(Callback):
    def eval_view(self):
        return View("nothing", lambda state: state)


def test_a_view_that_shows_the_state_itself_and_none_at_all():
    for callbacks in ([], [Nothing()]):
        made = Line(nn.Dense(1), optax.sgd(0.1), callbacks=callbacks)
        made.fit(DATA, steps=2)
        assert (
            made.evaluate(DATA) == made.evaluate(DATA, weights="live") == made.evaluate(DATA, weights="ema")
        )


def test_a_state_made_elsewhere_has_no_average():
    made = Line(nn.Dense(1), optax.sgd(0.1), callbacks=[EMA(0.9)])
    variables = nn.Dense(1).init(jax.random.key(1), X)
    made.state = tk.TrainState.from_variables(
        apply_fn=nn.Dense(1).apply, variables=variables, tx=optax.sgd(0.1), rng=jax.random.key(0)
    )
    assert_same(made.predict(DATA), np.asarray(nn.Dense(1).apply(variables, X)[:, 0]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("fn", "error", "message"),
    [
        (lambda state: state.params, TypeError, r"the view 'eval_view' returned dict: return the state"),
        (
            lambda state: state.replace(params={"kernel": state.params["kernel"]}),
            ValueError,
            r"another structure than the state: params/bias: float32\[1\] -> absent",
        ),
    ],
)
def test_views_of_another_kind(fn, error, message):
    made = Line(nn.Dense(1), optax.sgd(0.1), callbacks=[EvalView(fn)])
    made.init(DATA[0])
    with pytest.raises(error, match=message):
        made.evaluate(DATA)


def test_names():
    with pytest.raises(TypeError, match=r"EvalView\(fn='averaged'\): expected a function"):
        EvalView("averaged")
    for name in ("live", "averaged", 3):
        with pytest.raises(
            ValueError, match=r"a callback gives a view with the name .*give it another name="
        ):
            Line(nn.Dense(1), optax.sgd(0.1), callbacks=[EvalView(schedule_free, name=name)])
    twice = [EvalView(schedule_free), EvalView(schedule_free)]
    with pytest.raises(ValueError, match=r"two callbacks give a view with the name 'eval_view'"):
        Line(nn.Dense(1), optax.sgd(0.1), callbacks=twice)
