"""What a hook may ask of its fit, and what a trainer answers in the middle of one."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import trainkit as tk
from tests.helpers.weight import numbers, trainer, weight
from trainkit.callbacks import EMA, Lambda

HOOKS = (
    "on_fit_start",
    "on_epoch_start",
    "on_step",
    "on_eval_start",
    "on_eval_end",
    "on_epoch_end",
    "on_fit_end",
)
DATA = numbers(1, 2, 3)


class Line(tk.Trainer):
    """`y = w x`, whose loss is w itself: an evaluation shows which weights it was of."""

    def loss(self, model, batch, ctx):
        w = model(batch)
        return jnp.broadcast_to(w, batch.shape), {}

    def predict_step(self, model, batch, ctx):
        return batch * model(batch)


class Scale(nn.Module):
    @nn.compact
    def __call__(self, x):
        return self.param("w", nn.initializers.zeros, ())

    def noisy(self, x):
        return x + jax.random.normal(self.make_rng("noise"), x.shape)


def line(*callbacks, **options):
    # Each step takes 1 off the weight, so that it tells the step.
    return Line(Scale(), optax.sgd(1.0), callbacks=callbacks, **options)


def times(model, x):
    return x * model(x)


def asking(hook, look, **options):
    """What `look(info, trainer)` returned in each call of a hook, in a fit of two passes over three batches."""
    found = []
    made = line(Lambda(**{hook: lambda info: found.append(look(info, made))}), **options)
    made.fit(DATA, epochs=2, eval_data=DATA)
    return found


STEPS = {
    "on_fit_start": [0],
    "on_epoch_start": [0, 3],
    "on_step": [1, 2, 3, 4, 5, 6],
    "on_eval_start": [3, 6],
    "on_eval_end": [3, 6],
    "on_epoch_end": [3, 6],
    "on_fit_end": [6],
}


@pytest.mark.parametrize("hook", HOOKS)
def test_every_question_is_answered_for_the_state_of_the_moment(hook):
    x = np.arange(4, dtype=np.float32)

    def look(info, made):
        w = -float(info.step)
        assert info.evaluate(DATA)["loss"] == made.evaluate(DATA)["loss"] == w
        for predicted in (info.predict([x]), made.predict([x])):
            np.testing.assert_array_equal(predicted, w * x)
        for applied in (info.apply(times, x), made.apply(times, x)):
            np.testing.assert_array_equal(applied, w * x)
        assert weight(made.state) == weight(info.state) == w
        return info.step

    assert asking(hook, look) == STEPS[hook]


def test_several_sources_are_evaluated_by_name():
    made = line()
    made.fit(DATA, epochs=1)
    assert made.evaluate({"a": DATA, "b": DATA[:1]}) == {"a/loss": -3.0, "b/loss": -3.0}
    with pytest.raises((TypeError, ValueError), match="batch"):
        made.evaluate({"x": DATA[0]})


def test_the_averages_are_asked_unless_the_live_weights_are():
    found = []

    def look(info):
        for weights in ("averaged", "ema", "live"):
            found.append(
                (info.evaluate(DATA, weights=weights)["loss"], float(info.apply(times, 1.0, weights=weights)))
            )

    line(Lambda(on_fit_end=look), EMA(0.5)).fit(DATA, steps=2)
    mean = 0.5 * (0.5 * 0 + 0.5 * -1) + 0.5 * -2
    assert found == [(mean, mean), (mean, mean), (-2.0, -2.0)]


def test_what_is_applied_is_compiled_once_and_changes_nothing():
    traced = []

    def counted(model, x):
        traced.append(1)
        return model(x) * x

    def look(info, made):
        return float(info.apply(counted, 2.0))

    assert asking("on_step", look) == [-2.0, -4.0, -6.0, -8.0, -10.0, -12.0]
    assert len(traced) == 1
    quiet, asked = line(), line(Lambda(on_step=lambda info: info.apply(times, 1.0) and None))
    assert weight(quiet.fit(DATA, epochs=2).state) == weight(asked.fit(DATA, epochs=2).state)


@pytest.mark.parametrize("strategy", ["jit", "vmap", "pmap"])
def test_a_key_reaches_every_stream_as_in_apply(strategy):
    made, x = line(strategy=strategy), np.zeros(3, np.float32)
    state = made.init(DATA[0])

    def noisy(model, x):
        return model.noisy(x)

    def by_hand(rng):
        return Scale().apply(state.variables, x, rngs={"noise": rng}, method="noisy")

    np.testing.assert_array_equal(made.apply(noisy, x, rng=7), by_hand(jax.random.key(7)))
    np.testing.assert_array_equal(made.apply(noisy, x), by_hand(jax.random.fold_in(state.rng, 0)))


def test_what_can_not_be_applied_is_named():
    made = line()
    made.init(DATA[0])
    with pytest.raises(TypeError, match=r"function of the bound module, got str"):
        made.apply("encode")
    with pytest.raises(TypeError, match=r"given str as argument 0.*functools.partial"):
        made.apply(times, "mean")


def test_questions_end_with_the_hook():
    kept = []
    line(Lambda(on_step=lambda info: kept.append(info))).fit(DATA, epochs=1)
    for question, args in (("evaluate", [DATA]), ("predict", [DATA]), ("apply", [times, 1.0])):
        with pytest.raises(RuntimeError, match=f"info.{question} answers only during the hook"):
            getattr(kept[0], question)(*args)


def test_a_state_read_from_the_trainer_in_a_hook_is_not_taken_by_a_later_step():
    kept = asking("on_step", lambda info, made: made.state)
    assert [weight(state) for state in kept] == [-1, -2, -3, -4, -5, -6]
    same = asking("on_step", lambda info, made: (held := made.state) is made.state and held is not info.state)
    assert same == [True] * 6


WITHIN = {
    "fit": (
        lambda made: made.fit(DATA, epochs=1),
        r"trainer.fit was called while trainer.fit runs: return tk.Stop",
    ),
    "init": (lambda made: made.init(DATA[0]), r"trainer.init .* return tk.Stop\(reason\)"),
    "restore": (lambda made: made.restore("nowhere"), r"trainer.restore .* return tk.Rollback\(reason\)"),
    "reset": (lambda made: made.reset(), r"trainer.reset .* return tk.Stop\(reason\)"),
    "state": (lambda made: setattr(made, "state", made.state), r"trainer.state = ... .* return tk.Update"),
}


@pytest.mark.parametrize("what", WITHIN)
def test_what_would_pull_the_state_from_under_a_fit_names_what_to_return(what):
    act, message = WITHIN[what]

    def look(info, made):
        with pytest.raises(RuntimeError, match=message):
            act(made)
        return info.step

    assert asking("on_step", look) == [1, 2, 3, 4, 5, 6]


def test_a_second_thread_is_refused_while_a_fit_runs_and_served_after():
    raised = {}

    def from_another_thread(made):
        acts = {name: act for name, (act, _) in WITHIN.items()}
        acts |= {"evaluate": lambda made: made.evaluate(DATA), "read": lambda made: made.state}
        for name, act in acts.items():
            try:
                act(made)
            except RuntimeError as error:
                raised[name] = str(error)

    def in_thread(made):
        thread = threading.Thread(target=from_another_thread, args=(made,), name="other")
        thread.start()
        thread.join()

    asking("on_fit_start", lambda info, made: in_thread(made))
    assert raised.keys() == {*WITHIN, "evaluate", "read"}
    for message in raised.values():
        assert "in the thread 'other' while trainer.fit runs in" in message
    made, raised = trainer(), {}
    made.fit(DATA, epochs=1)
    thread = threading.Thread(target=lambda: raised.update(made.evaluate(DATA)))
    thread.start()
    thread.join()
    assert raised["loss"] == 2.0


def test_a_fit_that_raised_leaves_the_trainer_to_everyone():
    made = line(Lambda(on_step=lambda info: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        made.fit(DATA, epochs=1)
    assert made.evaluate(DATA)["loss"] == -1.0
