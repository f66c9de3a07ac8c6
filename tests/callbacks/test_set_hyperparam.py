"""`SetHyperparam` against SGD by hand: which rate each update used."""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

import trainkit as tk
from tests.helpers.compilations import count_compilations
from trainkit.callbacks import SetHyperparam


class Two(nn.Module):
    """Two numbers, of two modules."""

    @nn.compact
    def __call__(self):
        return [Number(name=name)() for name in ("body", "head")]


class Number(nn.Module):
    @nn.compact
    def __call__(self):
        return self.param("w", nn.initializers.zeros, ())


class Falling(tk.Trainer):
    """Each number falls by its rate at every step."""

    def loss(self, model, batch, ctx):
        body, head = model()
        return batch * (body + head), {}


DATA = [np.ones(4, np.float32)] * 3
SGD = optax.inject_hyperparams(optax.sgd)


def groups():
    return tk.optim.by_path({"body": SGD(learning_rate=0.5), "he[a]d": SGD(learning_rate=0.25)})


def make(tx, *callbacks, **options):
    return Falling(Two(), tx, callbacks=callbacks, **options)


def numbers(state):
    return [float(state.params[name]["w"]) for name in ("body", "head")]


def rate(info):
    return 1.0 + info.step


@pytest.mark.parametrize(
    ("tx", "group", "expected"),
    [
        # Updates 1 and 2 with the rate of the start, 3 and 4 with 1 + 2, 5 with 1 + 4.
        pytest.param(lambda: SGD(learning_rate=0.5), None, [-12.0, -12.0], id="one"),
        pytest.param(groups, None, [-12.0, -11.5], id="all groups"),
        pytest.param(groups, "he[a]d", [-2.5, -11.5], id="one group"),
    ],
)
@pytest.mark.parametrize("steps_per_call", [1, 3])
def test_it_holds_for_the_updates_after_it(tx, group, expected, steps_per_call):
    callback = SetHyperparam("learning_rate", rate, every=tk.Every(steps=2), group=group)
    trainer = make(tx(), callback, steps_per_call=steps_per_call)
    assert numbers(trainer.fit(DATA, steps=5).state) == expected


def test_nothing_compiles_again_and_the_log_has_the_rate_that_was_used():
    seen = tk.callbacks.LearningRate(every=tk.Every(steps=1))
    trainer = make(SGD(learning_rate=0.5), SetHyperparam("learning_rate", rate), seen, steps_per_call=1)
    trainer.fit(DATA, steps=2)
    with count_compilations() as count:
        result = trainer.fit(DATA, steps=2)
    assert count() == 0
    assert result.history["learning_rate"] == [(1, 0.5), (2, 2.0), (3, 3.0), (4, 4.0)]


def test_a_resumed_run_goes_on_with_the_value(tmp_path):
    def run(steps, **options):
        callbacks = [SetHyperparam("learning_rate", rate, every=tk.At(steps=(2,))), tk.callbacks.Checkpoint()]
        return make(SGD(learning_rate=0.5), *callbacks, logdir=tmp_path).fit(DATA, steps=steps, resume=True)

    run(3)
    assert numbers(run(5).state) == [-10.0, -10.0]


def test_it_takes_numbers_of_any_kind():
    kinds = [
        lambda info: np.array(3),
        lambda info: np.float32(3),
        lambda info: jax.numpy.float32(3),
        lambda info: 3,
    ]
    for kind in kinds:
        trainer = make(SGD(learning_rate=1.0), SetHyperparam("learning_rate", kind))
        assert numbers(trainer.fit(DATA, steps=2).state) == [-4.0, -4.0]


@pytest.mark.parametrize(
    ("make_it", "error", "match"),
    [
        (lambda: SetHyperparam("b3", rate), ValueError, r"'b3'.*other names only: learning_rate"),
        (
            lambda: SetHyperparam("learning_rate", rate, group="tail"),
            ValueError,
            r"'tail'.*'body', 'he\[a\]d'",
        ),
        (
            lambda: SetHyperparam("learning_rate", lambda info: float("nan")),
            ValueError,
            "returned nan at step 1",
        ),
        (
            lambda: SetHyperparam("learning_rate", lambda info: float("inf")),
            ValueError,
            "returned inf at step 1",
        ),
        (lambda: SetHyperparam("learning_rate", lambda info: None), TypeError, "returned NoneType at step 1"),
        (lambda: SetHyperparam("learning_rate", lambda info: np.ones(2)), TypeError, "returned ndarray"),
    ],
)
def test_what_can_not_be_is_refused_in_a_fit(make_it, error, match):
    with pytest.raises(error, match=match):
        make(groups(), make_it()).fit(DATA, steps=1)


def test_an_optimizer_without_such_values_is_refused():
    with pytest.raises(ValueError, match="no injected hyperparameters"):
        make(optax.sgd(0.1), SetHyperparam("learning_rate", rate)).fit(DATA, steps=1)
    scheduled = SGD(learning_rate=optax.constant_schedule(0.1))
    with pytest.raises(ValueError, match="a schedule computes it"):
        make(scheduled, SetHyperparam("learning_rate", rate)).fit(DATA, steps=1)
    with pytest.raises(ValueError, match="it has no groups"):
        make(SGD(learning_rate=0.1), SetHyperparam("learning_rate", rate, group="body")).fit(DATA, steps=1)


@pytest.mark.parametrize(
    ("args", "options", "match"),
    [
        ((3, rate), {}, "expected the name"),
        (("learning_rate", 0.1), {}, "expected a function"),
        (("learning_rate", rate), {"group": 3}, "expected a pattern"),
        (("learning_rate", rate), {"every": 3}, "expected tk.Every"),
    ],
)
def test_wrong_arguments_are_refused(args, options, match):
    with pytest.raises(TypeError, match=match):
        SetHyperparam(*args, **options)
