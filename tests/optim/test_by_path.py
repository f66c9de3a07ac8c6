"""Groups of parameters by path: the rule of patterns, and the numbers against NumPy and optax."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainkit as tk
from trainkit.optim import by_path

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
PARAMS = {
    "encoder": {"Dense_0": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}},
    "head": {"kernel": jnp.ones((2, 3)), "scale": jnp.ones(())},
}
GRADS = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 2.0), PARAMS)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, name="head")(Block(name="encoder")(x))


class Regression(tk.Trainer):
    def loss(self, model, batch, ctx):
        return ((model(batch["x"])[:, 0] - 1) ** 2), {}


def moved(tx):
    """How far one update moves the first element of each parameter, by path."""
    updates, _ = jax.jit(tx.update)(GRADS, tx.init(PARAMS), PARAMS)
    leaves = jax.tree_util.tree_leaves_with_path(updates)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): float(leaf.ravel()[0])
        for path, leaf in leaves
    }


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({"encoder": 1, ".*": 2}, (1, 1, 2, 2)),
        ({".*": 2, "encoder": 1}, (2, 2, 2, 2)),
        ({"bias$": 1, "kernel$": 2, "scale$": 3}, (1, 2, 2, 3)),
        ({"^head/kernel$": 1, "Dense_0/kernel": 2, "a": 3}, (3, 2, 1, 3)),
    ],
    ids=str,
)
def test_the_first_pattern_found_in_a_path_wins(rates, expected):
    names = ("encoder/Dense_0/bias", "encoder/Dense_0/kernel", "head/kernel", "head/scale")
    found = moved(by_path({pattern: optax.sgd(rate) for pattern, rate in rates.items()}))
    assert found == {name: -2.0 * rate for name, rate in zip(names, expected, strict=True)}


@pytest.mark.parametrize(
    ("groups", "error", "match"),
    [
        (
            {"decoder": 1, ".*": 1},
            ValueError,
            r"'decoder' is found.*encoder/Dense_0/bias, encoder/Dense_0/kernel",
        ),
        ({"encoder": 1}, ValueError, r"no pattern is found in the paths head/kernel, head/scale.*'encoder'"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(groups, error, match):
    tx = by_path({pattern: optax.sgd(rate) for pattern, rate in groups.items()})
    with pytest.raises(error, match=match):
        tx.init(PARAMS)


@pytest.mark.parametrize(
    ("groups", "error", "match"),
    [
        ([("a", optax.sgd(1))], TypeError, "mapping of patterns"),
        ({}, ValueError, "has no group"),
        ({"a": 1e-3}, TypeError, "the group 'a' is 0.001; expected an optax transformation"),
        ({1: optax.sgd(1)}, TypeError, "1 is no pattern"),
        ({"(": optax.sgd(1)}, ValueError, "is no regular expression"),
    ],
)
def test_bad_groups_are_refused(groups, error, match):
    with pytest.raises(error, match=match):
        by_path(groups)


def test_each_group_has_its_own_count_schedule_and_clipping():
    # The second group clips to norm 1 what has the norm 2 * sqrt(7), and counts its own updates.
    schedule = optax.piecewise_constant_schedule(1.0, {1: 0.5})
    tx = by_path(
        {"encoder": optax.sgd(schedule), ".*": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))}
    )
    state = tx.init(PARAMS)
    for rate in (1.0, 0.5):
        updates, state = tx.update(GRADS, state, PARAMS)
        np.testing.assert_allclose(updates["encoder"]["Dense_0"]["kernel"], np.full((2, 2), -2.0 * rate))
        np.testing.assert_allclose(updates["head"]["kernel"], np.full((2, 3), -1 / np.sqrt(7)), rtol=1e-6)


def test_it_nests_and_passes_extra_arguments_on():
    plateau = optax.contrib.reduce_on_plateau(patience=1, factor=0.5)
    tx = by_path({"encoder": optax.sgd(1.0), ".*": optax.chain(optax.sgd(1.0), plateau)})
    state = tx.init(PARAMS)
    for _ in range(4):
        updates, state = optax.chain(tx).update(GRADS, (state,), PARAMS, value=1.0)
        (state,) = state
    assert float(updates["head"]["scale"]) > -2.0
    assert float(updates["encoder"]["Dense_0"]["bias"][0]) == -2.0
    counted = optax.tree_utils.tree_map_params(tx, lambda leaf: leaf * 0, state)
    assert jax.tree.structure(counted) == jax.tree.structure(state)


def train(tx, *callbacks, strategy="jit", **options):
    trainer = Regression(Model(), tx, callbacks=callbacks, strategy=strategy, **options)
    data = tk.data.Arrays({"x": X}, batch_size=8)
    return trainer, data


def test_a_trainer_trains_resumes_and_shows_groups(tmp_path):
    def make():
        inject = optax.inject_hyperparams(optax.sgd)
        return by_path(
            {"encoder/.*kernel": inject(learning_rate=0.1), "[b]ias|head": inject(learning_rate=0.0)}
        )

    callbacks = [
        tk.callbacks.LearningRate(every=tk.Every(steps=1)),
        tk.callbacks.Checkpoint(every=tk.Every(steps=1)),
    ]
    trainer, data = train(make(), *callbacks, logdir=tmp_path)
    start = jax.device_get(trainer.init({"x": X}).params)
    result = trainer.fit(data, steps=2)
    assert result.history["learning_rate/encoder/.*kernel"][-1] == (2, np.float32(0.1))
    np.testing.assert_array_equal(result.state.params["head"]["kernel"], start["head"]["kernel"])
    assert (
        np.abs(
            result.state.params["encoder"]["Dense_0"]["kernel"] - start["encoder"]["Dense_0"]["kernel"]
        ).max()
        > 0
    )
    table = trainer.summary()
    assert "| Group" in table
    rows = {line.split("|")[1].strip(): line for line in table.splitlines() if "/kernel" in line}
    assert "encoder/.*kernel" in rows["encoder/Dense_0/kernel"]
    assert "[b]ias|head" in rows["head/kernel"]

    callbacks = [
        tk.callbacks.LearningRate(every=tk.Every(steps=1)),
        tk.callbacks.Checkpoint(every=tk.Every(steps=1)),
    ]
    again, data = train(make(), *callbacks, logdir=tmp_path)
    resumed = again.fit(data, steps=4, resume=True).state
    straight, data = train(make())
    for one, other in zip(
        jax.tree.leaves(resumed.params),
        jax.tree.leaves(straight.fit(data, steps=4).state.params),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_a_pattern_without_match_is_refused_at_the_first_batch():
    trainer, data = train(by_path({"decoder": optax.sgd(0.1), ".*": optax.sgd(0.1)}))
    with pytest.raises(ValueError, match="'decoder' is found"):
        trainer.fit(data, steps=1)


def test_without_groups_the_table_has_no_such_column():
    trainer, data = train(optax.sgd(0.1))
    trainer.fit(data, steps=1)
    assert "Group" not in trainer.summary()
