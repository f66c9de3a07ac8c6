"""`Finetune` against optax by hand: each group with an optimizer of its own, made at its release."""

import functools

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

import trainkit as tk
from tests.helpers.compare import assert_same
from tests.helpers.compilations import count_compilations
from tests.helpers.runs import plain
from trainkit.callbacks import Finetune

X = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
BATCHES = [{"x": X[:8]}, {"x": X[8:]}]
CLOSE = {"rtol": 2e-5, "atol": 2e-6}
STEPS, RELEASES = 7, {"mid": 2, "enc": 4}


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(use_running_average=not train, momentum=0.9)(
            nn.Dense(5, use_bias=False)(x)  # one would have no gradient but rounding, which Adam makes large
        )


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.tanh(Encoder(name="enc")(x, train))
        return nn.Dense(1, name="head")(nn.tanh(nn.Dense(3, name="mid")(x)))


class Regression(tk.Trainer):
    def loss(self, model, batch, ctx):
        return (model(batch["x"], train=ctx.train)[:, 0] - 1) ** 2, {}


def thawing(**groups):
    groups = groups or {name: tk.At(steps=(step,)) for name, step in RELEASES.items()}
    return Finetune({f"^{name}/": cadence for name, cadence in groups.items()})


class Seen(tk.callbacks.Callback):
    """The parameters and statistics after each step."""

    def __init__(self):
        self.params, self.stats = [], []

    def on_step(self, info):
        self.params.append(jax.device_get(info.state.params))
        self.stats.append(jax.device_get(info.state.batch_stats))


def make(tx, *callbacks, **options):
    options = {"steps_per_call": 1, **options}
    return Regression(Net(), tx, callbacks=callbacks, **options)


def by_hand(start, tx, clip=None, releases=RELEASES, steps=STEPS):
    """The parameters and statistics after each step of a loop by hand.

    Each module has an optimizer of its own, made when the module is released; `clip` sees what is trained together.
    """
    params, stats, states, after = start["params"], start["batch_stats"], {}, []

    def loss(params, stats, batch):
        variables = {"params": params, "batch_stats": stats}
        out, updated = Net().apply(variables, batch["x"], train=True, mutable=["batch_stats"])
        return ((out[:, 0] - 1) ** 2).mean(), updated["batch_stats"]

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    for step in range(steps):
        trained = [name for name in params if releases.get(name, 0) <= step]
        grads, stats = gradient(params, stats, BATCHES[step % 2])
        grads = {name: grads[name] for name in trained}
        if clip is not None:
            norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(grads)))
            grads = jax.tree.map(lambda leaf, norm=norm: leaf * min(1.0, clip / norm), grads)
        for name in trained:
            own = {name: params[name]}
            states.setdefault(name, tx.init(own))
            updates, states[name] = tx.update({name: grads[name]}, states[name], own)
            params = {**params, **optax.apply_updates(own, updates)}
        after.append((jax.device_get(params), jax.device_get(stats)))
    return after


def falling(count):
    return 0.1 * 0.8**count


def label(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: str(path[-1].key == "kernel"), params)


BY_PATH = {"kernel": optax.adam(0.05), ".*": optax.sgd(falling)}
OPTIMIZERS = {
    "momentum": (optax.sgd(0.05, momentum=0.9), None, None),
    "adamw, schedule": (optax.adamw(falling, weight_decay=0.3), None, None),
    "clip, adam": (optax.chain(optax.clip_by_global_norm(0.05), optax.adam(0.05)), optax.adam(0.05), 0.05),
    "clip, momentum": (
        optax.chain(optax.clip_by_global_norm(0.05), optax.sgd(0.5, momentum=0.9)),
        optax.sgd(0.5, momentum=0.9),
        0.05,
    ),
    "injected": (optax.inject_hyperparams(optax.adamw)(falling, weight_decay=0.3), None, None),
    "by path": (
        tk.optim.by_path(BY_PATH),
        optax.partition({"True": BY_PATH["kernel"], "False": BY_PATH[".*"]}, label),
        None,
    ),
    "multi steps": (
        optax.MultiSteps(optax.adam(0.05), 2).gradient_transformation(),
        optax.MultiSteps(optax.adam(0.05), 2).gradient_transformation(),
        None,
    ),
    "factored": (optax.adafactor(0.05, min_dim_size_to_factor=2), None, None),
    "lamb": (optax.lamb(0.05, weight_decay=0.1), None, None),
}


def assert_after(seen, expected):
    for params, stats, (wanted, wanted_stats) in zip(seen.params, seen.stats, expected, strict=True):
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, **CLOSE), params, wanted)
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, **CLOSE), stats, wanted_stats)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_each_group_is_trained_from_its_release_on_with_a_fresh_optimizer(kind):
    tx, alone, clip = OPTIMIZERS[kind]
    seen = Seen()
    trainer = make(tx, thawing(), seen)
    start = jax.device_get(trainer.init(BATCHES[0]).variables)
    trainer.fit(BATCHES, steps=STEPS)
    assert_after(seen, by_hand(start, alone or tx, clip))
    # Until then a group is the very same; update 3 is the first to move `mid`, update 5 the first to move `enc`.
    for step, (params, stats) in enumerate(zip(seen.params, seen.stats, strict=True), start=1):
        for name, release in RELEASES.items():
            same = jax.tree.map(np.array_equal, params[name], start["params"][name])
            assert all(jax.tree.leaves(same)) == (step <= release) or (
                kind == "multi steps" and step == release + 1
            )
        assert not np.array_equal(
            stats["enc"]["BatchNorm_0"]["mean"], start["batch_stats"]["enc"]["BatchNorm_0"]["mean"]
        )


@pytest.mark.parametrize(
    "options", [{"steps_per_call": 3}, {"steps_per_call": "auto"}, {"accumulate": 1, "remat": True}], ids=str
)
def test_it_does_not_depend_on_how_steps_are_run(options):
    tx = optax.adamw(falling, weight_decay=0.3)
    trainer = make(tx, thawing(), **options)
    start = jax.device_get(trainer.init(BATCHES[0]).variables)
    state = trainer.fit(BATCHES, steps=STEPS).state
    params, _ = by_hand(start, tx)[-1]
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, **CLOSE), state.params, params)


def run_to(steps, cadences, **options):
    """A run whose groups are released after steps 2 and 4, or after the first and second pass of two steps."""
    finetune = thawing() if cadences == "steps" else thawing(mid=tk.Every(epochs=1), enc=tk.Every(epochs=2))
    callbacks = [finetune, tk.callbacks.EMA(0.5)]
    if options:
        callbacks.append(tk.callbacks.Checkpoint(every=tk.Every(steps=1)))
    return (
        make(optax.adamw(falling), *callbacks, **options)
        .fit(BATCHES, steps=steps, resume=bool(options))
        .state
    )


@functools.cache
def straight(cadences):
    return run_to(5, cadences)


@pytest.mark.parametrize(
    ("cadences", "broken_off"),
    [("steps", 1), ("steps", 2), ("steps", 3), ("steps", 4), ("epochs", 2), ("epochs", 3)],
)
def test_a_resumed_run_is_that_which_was_never_broken_off(tmp_path, cadences, broken_off):
    run_to(broken_off, cadences, logdir=tmp_path)
    assert_same(plain(run_to(5, cadences, logdir=tmp_path)), plain(straight(cadences)))


@pytest.mark.parametrize("cadences", ["steps", "epochs"])
def test_a_release_after_a_pass_is_that_after_its_last_step(cadences):
    start = jax.device_get(make(optax.sgd(0.1), thawing()).init(BATCHES[0]).variables)
    params, _ = by_hand(start, optax.adamw(falling), steps=5)[-1]
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, **CLOSE), straight(cadences).params, params
    )


def test_a_release_compiles_one_program_and_a_second_run_none():
    counts = []
    with count_compilations() as count:
        noting = tk.callbacks.Lambda(on_step=lambda info: counts.append(count()))
        trainer = make(optax.adam(0.1), thawing(), noting)
        trainer.fit(BATCHES, steps=STEPS)
        compiled = np.diff(counts).tolist()
        # Between the ends of steps 2 and 3, and of 4 and 5; the first end of a pass compiles what reads its metrics.
        assert compiled[3] == 1
        assert compiled[2] == compiled[4] == compiled[5] == 0
        assert compiled[1] <= 2
        before = count()
        trainer.reset()
        trainer.fit(BATCHES, steps=STEPS)
        assert count() == before


def test_what_is_frozen_costs_no_gradient():
    def flops(callback):
        trainer = make(optax.adam(0.1), *callback)
        state, batch = trainer.init(BATCHES[0]), BATCHES[0]
        engine = trainer._engine
        given, _ = engine.held((), 0)
        attempt = jax.jit(lambda given, state: engine.steps.attempt(given, state, batch, None).state.params)
        return attempt.lower(given, state).compile().cost_analysis()["flops"]

    frozen = flops([Finetune({"enc|mid": tk.Never()})])
    assert frozen < 0.6 * flops([])


def test_hooks_see_gradients_of_zero_for_what_is_frozen():
    def update(memory, values):
        return jax.tree.map(lambda grad: abs(grad).sum(), values.grads)

    class Look(tk.callbacks.Callback):
        def step_hook(self):
            return tk.hooks.StepHook(
                "look", lambda state: jax.tree.map(lambda leaf: leaf.sum() * 0, state.params), update
            )

    state = make(optax.sgd(0.1), thawing(mid=tk.Never()), Look()).fit(BATCHES, steps=1).state
    found = jax.device_get(state.hooks["look"])
    assert not any(jax.tree.leaves(found["mid"]))
    assert found["head"]["kernel"] > 0
    assert found["enc"]["Dense_0"]["kernel"] > 0


def test_never_is_for_good_and_the_first_step_of_a_cadence_counts():
    finetune = thawing(enc=tk.Never(), mid=tk.Every(steps=3))
    trainer = make(optax.sgd(0.05), finetune)
    start = jax.device_get(trainer.init(BATCHES[0]).variables)
    state = trainer.fit(BATCHES, steps=STEPS).state
    params, _ = by_hand(start, optax.sgd(0.05), releases={"enc": np.inf, "mid": 3})[-1]
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, **CLOSE), state.params, params)
    jax.tree.map(np.testing.assert_array_equal, state.params["enc"], start["params"]["enc"])


def test_nothing_need_be_trained_at_first():
    trainer = make(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)), Finetune({".*": tk.At(steps=(2,))})
    )
    start = jax.device_get(trainer.init(BATCHES[0]).params)
    state = trainer.fit(BATCHES, steps=2).state
    jax.tree.map(np.testing.assert_array_equal, state.params, start)
    state = trainer.fit(BATCHES, steps=1).state
    assert not np.array_equal(state.params["head"]["kernel"], start["head"]["kernel"])


def test_the_rates_of_groups_can_be_set_apart():
    rates = tk.callbacks.LearningRate(every=tk.Every(steps=1))
    setting = tk.callbacks.SetHyperparam(
        "learning_rate", lambda info: 0.5, every=tk.At(steps=(1,)), group="^mid/"
    )
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    history = make(tx, thawing(mid=tk.At(steps=(1,))), setting, rates).fit(BATCHES, steps=2).history
    assert history["learning_rate/^mid/"] == [(1, np.float32(0.1)), (2, 0.5)]
    assert history["learning_rate/rest"] == [(1, np.float32(0.1)), (2, np.float32(0.1))]


def test_a_state_of_another_optimizer_is_refused():
    trainer = make(optax.adam(0.1), thawing())
    state = trainer.init(BATCHES[0])
    trainer.state = state.replace(opt_state=optax.adam(0.1).init(state.params))
    with pytest.raises(ValueError, match="keeps the optimizer state by groups"):
        trainer.fit(BATCHES, steps=1)


def test_an_optimizer_that_does_not_part_its_state_is_refused():
    with pytest.raises(ValueError, match="the state of this optimizer has no such parts"):
        make(optax.flatten(optax.adam(0.1)), thawing()).fit(BATCHES, steps=1)


@pytest.mark.parametrize(
    ("callbacks", "match"),
    [
        ([Finetune({"decoder": tk.Never()})], r"Finetune: .*'decoder' is found.*enc/BatchNorm_0/bias"),
        ([thawing(), Finetune({"mid": tk.Never()})], "callbacks has Finetune and Finetune"),
    ],
)
def test_what_does_not_fit_is_refused(callbacks, match):
    with pytest.raises(ValueError, match=match):
        make(optax.sgd(0.1), *callbacks).fit(BATCHES, steps=1)


@pytest.mark.parametrize(
    ("groups", "error", "match"),
    [
        (["enc"], TypeError, "mapping of patterns"),
        ({}, ValueError, "freezes nothing"),
        ({"enc": 10}, TypeError, "expected tk.Every"),
        ({3: tk.Never()}, TypeError, "3 is no pattern"),
        ({"(": tk.Never()}, ValueError, "no regular expression"),
        ({"enc": tk.Every(seconds=3)}, ValueError, "another step in every run"),
    ],
)
def test_wrong_arguments_are_refused(groups, error, match):
    with pytest.raises(error, match=match):
        Finetune(groups)
