"""`ReduceOnPlateau` against `optax.contrib.reduce_on_plateau`, and the surgery on optimizer states."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers.infos import evaluations, make_info
from trainkit._core.state import TrainState
from trainkit.callbacks import Plan, ReduceOnPlateau, Update

PARAMS = {"body": {"w": np.ones((2, 3), np.float32)}, "head": {"w": np.ones((3,), np.float32)}}


def make_tx(rate=0.5):
    return optax.inject_hyperparams(optax.adam)(learning_rate=rate)


def make_state(tx=None, params=PARAMS):
    params = jax.tree.map(jnp.asarray, params)
    return TrainState.create(apply_fn=None, params=params, tx=tx or make_tx())


def begin(plateau, state=None, step=0):
    plateau.on_fit_start(make_info(step, state=state or make_state()))
    return plateau


def reductions(plateau, values):
    """The numbers of the evaluations, from 0, that reduced."""
    return [number for number, action in enumerate(evaluations(plateau, values)) if action is not None]


def optax_reductions(values, *, patience, cooldown):
    tx = optax.contrib.reduce_on_plateau(
        factor=0.5, patience=patience, cooldown=cooldown, rtol=0.0, atol=1e-12
    )
    state, reduced = tx.init(jnp.zeros(())), []
    update = jax.jit(lambda state, value: tx.update(jnp.zeros(()), state, value=value)[1])
    for number, value in enumerate(values):
        new = update(state, value)
        if float(new.scale) < float(state.scale):
            reduced.append(number)
        state = new
    return reduced


@pytest.mark.parametrize(("cooldown", "expected"), [(0, [2, 4, 6, 8]), (1, [2, 5, 8]), (2, [2, 6])])
def test_never_improving(cooldown, expected):
    plateau = begin(ReduceOnPlateau("eval/loss", mode="min", patience=2, cooldown=cooldown))
    assert reductions(plateau, [1.0] * 9) == expected
    assert optax_reductions([1.0] * 9, patience=2, cooldown=cooldown) == expected


@pytest.mark.parametrize("cooldown", [0, 1, 2, 3])
@pytest.mark.parametrize("patience", [1, 2, 3])
def test_counts_as_optax_does(patience, cooldown):
    rng = np.random.default_rng(10 * patience + cooldown)
    # Multiples of 1/8 that go down slowly, exact in float32, with ties and improvements during cooldown.
    values = [float(v) for v in (np.linspace(40, 10, 60) + rng.integers(-8, 9, 60)).round() / 8]
    plateau = begin(ReduceOnPlateau("eval/loss", mode="min", patience=patience, cooldown=cooldown))
    expected = optax_reductions(values, patience=patience, cooldown=cooldown)
    assert expected
    assert reductions(plateau, values) == expected
    mirrored = begin(ReduceOnPlateau("eval/loss", mode="max", patience=patience, cooldown=cooldown))
    assert reductions(mirrored, [-value for value in values]) == expected


def test_non_finite_values_are_no_improvement():
    plateau = begin(ReduceOnPlateau("eval/loss", mode="min", patience=2))
    assert reductions(plateau, [1.0, math.nan, -math.inf]) == [2]
    assert plateau.state_dict()["best"] == 1.0


def test_training_metrics_are_counted_at_the_end_of_epochs():
    plateau = ReduceOnPlateau("train/loss", mode="min", patience=1)
    plateau.on_fit_start(make_info(state=make_state(), plan=Plan()))
    assert plateau.on_epoch_end(make_info(20, {"train/loss": 1.0})) is None
    assert isinstance(plateau.on_epoch_end(make_info(40, {"train/loss": 1.0})), Update)


def test_survives_a_resume_through_json():
    values = [1.0] * 12
    arguments = {"mode": "min", "patience": 2, "cooldown": 2}
    whole = reductions(begin(ReduceOnPlateau("eval/loss", **arguments)), values)
    for cut in range(1, 11):
        before = begin(ReduceOnPlateau("eval/loss", **arguments))
        first = reductions(before, values[:cut])
        after = ReduceOnPlateau("eval/loss", **arguments)
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        begin(after, step=10 * cut)
        assert first + [cut + number for number in reductions(after, values[cut:])] == whole


def test_another_run_begins_afresh_and_a_second_fit_does_not():
    plateau = begin(ReduceOnPlateau("eval/loss", mode="min", patience=2, cooldown=5))
    assert reductions(plateau, [1.0] * 3) == [2]
    begin(plateau, step=30)
    assert reductions(plateau, [1.0] * 5) == []
    plateau.reset()
    begin(plateau, step=30)
    assert plateau.state_dict() == {"best": None, "best_step": 0, "count": 0, "cooling": 0}


def reduce_once(state, **arguments):
    plateau = begin(ReduceOnPlateau("eval/loss", mode="min", patience=1, **arguments), state)
    action = evaluations(plateau, [1.0, 1.0])[-1]
    assert isinstance(action, Update)
    return action.fn(state)


def rates(tree, name="learning_rate"):
    """The values under dict keys of that name, found by paths, not by optax's types."""
    return [
        float(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if getattr(path[-1], "key", None) == name
    ]


def inner_adam(learning_rate, scale):
    return optax.chain(optax.inject_hyperparams(optax.sgd)(learning_rate=learning_rate), optax.scale(scale))


@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        pytest.param(make_tx(), [0.25], id="plain"),
        pytest.param(
            optax.chain(optax.clip(1.0), optax.chain(optax.identity(), make_tx())), [0.25], id="nested chains"
        ),
        pytest.param(
            optax.named_chain(("clip", optax.clip(1.0)), ("adam", make_tx())), [0.25], id="named chain"
        ),
        pytest.param(optax.MultiSteps(make_tx(), 2), [0.25], id="MultiSteps"),
        pytest.param(
            optax.masked(make_tx(), {"body": {"w": True}, "head": {"w": False}}), [0.25], id="masked"
        ),
        pytest.param(
            optax.partition(
                {"a": make_tx(0.5), "b": make_tx(0.25), "c": optax.set_to_zero()},
                {"body": {"w": "a"}, "head": {"w": "b"}},
            ),
            [0.25, 0.125],
            id="partition",
        ),
        pytest.param(
            optax.inject_hyperparams(inner_adam)(learning_rate=0.5, scale=2.0),
            [0.25, 0.25],
            id="in one another",
        ),
        pytest.param(optax.apply_if_finite(make_tx(), 3), [0.25], id="apply_if_finite"),
    ],
)
def test_finds_the_hyperparameter_anywhere(tx, expected):
    state = make_state(tx)
    reduced = reduce_once(state, factor=0.5)
    assert rates(reduced.opt_state) == expected
    assert jax.tree.structure(reduced) == jax.tree.structure(state)
    changed = [
        path
        for (path, old), new in zip(
            jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(reduced), strict=True
        )
        if not np.array_equal(old, new)
    ]
    assert len(changed) == len(expected)


def test_other_hyperparameters():
    state = make_state(optax.inject_hyperparams(optax.adamw)(learning_rate=0.5, weight_decay=0.5))
    reduced = reduce_once(state, factor=0.5, hyperparam="weight_decay")
    assert rates(reduced.opt_state, "weight_decay") == [0.25]
    assert rates(reduced.opt_state) == [0.5]


@pytest.mark.parametrize(("rate", "expected"), [(0.5, 0.05), (0.08, 0.04), (0.04, 0.04), (0.01, 0.01)])
def test_min_lr_bounds_and_never_raises(rate, expected):
    reduced = reduce_once(make_state(make_tx(rate)), factor=0.1, min_lr=0.04)
    np.testing.assert_allclose(rates(reduced.opt_state), [expected], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("committed", [False, True])
def test_nothing_compiles_again(dtype, committed, strict_dtypes):
    traces = 0
    params = {"w": jnp.ones((3,), dtype)}
    state = TrainState.create(
        apply_fn=None, params=params, tx=optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)
    )
    if committed:
        mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        state = jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))

    @jax.jit
    def step(state):
        nonlocal traces
        traces += 1
        return state.apply_gradients(grads=jax.tree.map(jnp.ones_like, state.params))

    state = step(step(state))
    compiled = step._cache_size()
    old = state.opt_state.hyperparams["learning_rate"]
    state = reduce_once(state, factor=0.5)
    new = state.opt_state.hyperparams["learning_rate"]
    assert (new.dtype, new.shape, new.weak_type) == (old.dtype, old.shape, old.weak_type)
    assert (new.sharding, new.committed) == (old.sharding, old.committed)
    after = step(state)
    assert (traces, step._cache_size()) == (1, compiled)
    # Two updates of 0.5, then one of 0.25, from 1.
    np.testing.assert_array_equal(np.asarray(after.params["w"], np.float32), np.full(3, -0.25, np.float32))


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (
            optax.adam(1e-3),
            r"no injected hyperparameters\. .*optax.inject_hyperparams\(optax.adam\)\(learning_rate=1e-3",
        ),
        (
            optax.inject_hyperparams(optax.scale_by_adam)(b1=0.9, b2=0.99),
            "of other names only: b1, b2",
        ),
        (
            optax.chain(
                optax.clip(1.0),
                optax.inject_hyperparams(optax.sgd)(learning_rate=optax.linear_schedule(1.0, 0.0, 10)),
            ),
            r"a schedule computes it anew at every update \(in opt_state at 1\)",
        ),
        (optax.inject_hyperparams(optax.sgd)(learning_rate=1), "int32.*give inject_hyperparams a float"),
    ],
)
def test_an_optimizer_that_can_not_be_changed_is_refused_at_the_start(tx, message):
    with pytest.raises(ValueError, match=message):
        begin(ReduceOnPlateau("eval/loss", mode="min"), make_state(tx))


@pytest.mark.parametrize(
    "arguments",
    [
        {"factor": 0.0},
        {"factor": 1.0},
        {"factor": math.nan},
        {"cooldown": -1},
        {"cooldown": 1.5},
        {"min_lr": -1.0},
    ],
)
def test_arguments_out_of_range(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        ReduceOnPlateau("eval/loss", **arguments)
