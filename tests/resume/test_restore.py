"""`Trainer.restore`, and checkpoints of models that changed: what is taken, what is refused, what is told."""

import functools
import pathlib
import shutil

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import trainkit as tk
from tests.helpers.compare import assert_same
from tests.helpers.digits import CLASSES, Net, NetTrainer, arrays
from tests.helpers.guides import load
from tests.helpers.runs import assert_equal, flip, largest_file, plain
from trainkit.callbacks import EMA, Checkpoint

EVERY = tk.Every(steps=2)
EVAL = tk.data.Arrays(arrays(40, 5), 16)


def data():
    return tk.data.Arrays(arrays(), 16, shuffle=True, seed=1)


def classifier(logdir=None, *, model=None, tx=None, callbacks=None, **options):
    keeper = [] if logdir is None else [Checkpoint(EVERY, keep=None, best=("eval/loss", "min"))]
    callbacks = [EMA(0.9)] if callbacks is None else callbacks
    return NetTrainer(
        model or Net(), tx or optax.adam(0.05), callbacks=[*callbacks, *keeper], logdir=logdir, **options
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 9 steps, in the second pass of 6, with checkpoints 2, 4, 6, 8, 9."""
    logdir = tmp_path_factory.mktemp("run")
    made = classifier(logdir)
    made.fit(data(), steps=9, eval_data=EVAL, eval_every=tk.Every(steps=4))
    return logdir, made


# What is meant ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "kind"), [("", str), ("checkpoints", pathlib.Path), ("checkpoints/9", str)]
)
def test_a_logdir_its_folder_of_checkpoints_or_one_of_them(run, where, kind):
    logdir, made = run
    fresh = classifier()
    restored = fresh.restore(kind(logdir / where))
    assert (restored.step, restored.path) == (9, str(logdir / "checkpoints" / "9"))
    assert restored.left == ()
    assert {"step", "rng", "params/Dense_0/kernel", "hooks/ema/params/Dense_0/kernel"} <= set(restored.loaded)
    assert_equal(fresh.state, made.state)


def test_by_step_and_by_name(run):
    logdir, _ = run
    scores = {info.step: info.scores for info in tk.checkpoint.list(logdir)}
    assert {step for step, known in scores.items() if known} == {4, 8}
    best = min((4, 8), key=lambda step: scores[step]["eval/loss"])
    fresh = classifier()
    for step, expected in ((4, 4), ("latest", 9), ("best", best)):
        assert fresh.restore(logdir, step=step).step == expected
        assert int(fresh.state.step) == expected
        # What the history knows of the evaluations up to then, and nothing later.
        evaluated = [at for at, _ in fresh.history["eval/loss"]]
        assert evaluated == [at for at in (4, 8) if at <= expected]


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (5, FileNotFoundError, r"has no checkpoint of step 5; it has those of 2, 4, 6, 8, 9"),
        ("newest", ValueError, r"step='newest': expected an int, 'latest' or 'best'"),
        (True, ValueError, r"step=True: expected an int"),
        (None, ValueError, r"step=None: expected an int"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(run, step, error, message):
    with pytest.raises(error, match=message):
        classifier().restore(run[0], step=step)


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_checkpoints(tmp_path, there):
    folder = tmp_path if there else tmp_path / "absent"
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*; give the logdir of a run"):
        classifier().restore(folder)


def test_damaged_ones_are_refused_by_step_and_passed_over_by_latest(run, tmp_path, caplog):
    shutil.copytree(run[0] / "checkpoints", tmp_path / "checkpoints")
    flip(largest_file(tmp_path / "checkpoints" / "9"))
    with pytest.raises(
        ValueError, match=r"the checkpoint of step 9 in .* is damaged: state/.*checksum differs"
    ):
        classifier().restore(tmp_path, step=9)
    fresh = classifier()
    assert fresh.restore(tmp_path).step == 8
    assert "the checkpoint of step 9 is damaged" in caplog.text
    assert (tmp_path / "checkpoints" / "9").is_dir()  # looking changes nothing
    (tmp_path / "checkpoints" / "9" / "meta.json").write_text("no json")
    assert fresh.restore(tmp_path, step="best").step in (4, 8)


# What follows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("has_state", "weights"), [(True, "ema"), (False, "live")])
def test_it_evaluates_and_predicts_as_the_trainer_that_saved(run, has_state, weights):
    logdir, made = run
    fresh = classifier(seed=5)
    if has_state:
        fresh.init(arrays(16))
    fresh.restore(logdir)
    assert fresh.evaluate(EVAL, weights=weights) == made.evaluate(EVAL, weights=weights)
    assert_same(fresh.predict(EVAL, weights=weights), made.predict(EVAL, weights=weights))


@pytest.mark.parametrize("has_state", [True, False])
def test_a_fit_goes_on_from_there_inside_its_pass(run, tmp_path, has_state):
    logdir, _ = run
    whole = classifier(tmp_path / "whole")
    whole.fit(data(), steps=14)
    fresh = classifier(tmp_path / "fresh", seed=5)
    if has_state:
        fresh.init(arrays(16))
    fresh.restore(logdir, step=8)
    result = fresh.fit(data(), steps=6)
    assert (result.step, result.epoch) == (14, 3)
    assert_equal(result.state, whole.state)


def test_a_held_state_survives_the_fit_after_a_restore(run):
    logdir, _ = run
    fresh = classifier()
    fresh.restore(logdir)
    held = fresh.state
    before = plain(held)
    fresh.fit(data(), steps=1)
    for name, leaf in plain(held).items():
        np.testing.assert_array_equal(leaf, before[name], err_msg=name)


# Another model ----------------------------------------------------------------------------------------------


class Wider(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(16)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(CLASSES + 2, name="head")(nn.relu(x))


CHANGES = {
    "model": (
        {"model": Wider()},
        [
            "params/Dense_1/kernel: float32[16, 4] -> absent",
            "params/head/kernel: absent -> float32[16, 6]",
        ],
    ),
    "shape": ({"model": Net(norm=False)}, ["batch_stats/BatchNorm_0/mean: float32[16] -> absent"]),
    "optimizer": ({"tx": optax.sgd(0.1)}, ["opt_state/0/count: int32[] -> absent"]),
    "moments in bfloat16": (
        {"tx": optax.adam(0.1, mu_dtype=jnp.bfloat16)},
        ["opt_state/0/mu/Dense_0/kernel: float32[8, 16] -> bfloat16[8, 16]"],
    ),
    "callbacks": ({"callbacks": []}, ["hooks/ema/count: int32[] -> absent"]),
    "another hook": (
        {"callbacks": [EMA(0.9), tk.callbacks.NanGuard("skip")]},
        ["hooks/nan_guard/record: absent -> int32[3]"],
    ),
}


@pytest.mark.parametrize(
    ("change", "how"),
    [*((change, "restore") for change in CHANGES), ("model", "resume"), ("another hook", "resume")],
)
def test_what_changed_is_refused_with_paths_shapes_and_dtypes(run, tmp_path, change, how):
    options, lines = CHANGES[change]
    changed = classifier(run[0] if how == "resume" else None, **options)
    if how == "resume":
        go_on = functools.partial(changed.fit, data(), steps=20, resume=True)
    else:
        changed.init(arrays(16))
        go_on = functools.partial(changed.restore, run[0])
    with pytest.raises(
        ValueError, match=r"of another model.*load what fits with trainer.restore\("
    ) as caught:
        go_on()
    for line in lines:
        assert line in str(caught.value)
    assert len(tk.checkpoint.list(run[0])) == 5  # nothing was lost


def test_a_trainer_without_a_state_is_compared_by_its_optimizer_and_callbacks(run):
    for options in ({"tx": optax.sgd(0.1)}, {"callbacks": []}):
        with pytest.raises(ValueError, match="of another model, optimizer or set of callbacks"):
            classifier(**options).restore(run[0])


# In part ----------------------------------------------------------------------------------------------------


def test_in_part_what_fits_is_taken_and_the_rest_told(run, caplog):
    logdir, made = run
    tuned = classifier(model=Wider(), seed=9)
    fresh = plain(tuned.init(arrays(16)))
    restored = tuned.restore(logdir, partial=True)
    assert restored.step == 9
    assert sorted(restored.loaded) == [
        "batch_stats/BatchNorm_0/mean",
        "batch_stats/BatchNorm_0/var",
        "params/BatchNorm_0/bias",
        "params/BatchNorm_0/scale",
        "params/Dense_0/bias",
        "params/Dense_0/kernel",
    ]
    assert restored.left == (
        "params/head/bias: not in the checkpoint",
        "params/head/kernel: not in the checkpoint",
    )
    assert "restored in part; left as they were: params/head/bias: not in the checkpoint" in caplog.text
    now, saved = plain(tuned.state), plain(made.state)
    for name, leaf in now.items():
        taken = name.startswith((".params['Dense_0']", ".params['BatchNorm_0']", ".batch_stats"))
        averaged = name.startswith(".hooks['ema']")
        if not averaged:
            np.testing.assert_array_equal(leaf, (saved if taken else fresh)[name], err_msg=name)
    assert int(tuned.state.step) == 0
    assert dict(tuned.history) == {}
    result = tuned.fit(data(), epochs=1)
    assert (result.step, result.epoch) == (6, 1)


def test_in_part_a_fresh_average_begins_at_what_was_taken(run):
    tuned = classifier(seed=9)
    tuned.init(arrays(16))
    tuned.restore(run[0], partial=True)
    state = tuned.state
    assert_same(EMA.view(state).params, state.params)
    assert_same(EMA.view(state).batch_stats, state.batch_stats)


def test_what_is_restored_is_not_tied_to_its_device(run):
    # A program for arrays that are tied is another, to be compiled beside that of a run that was never broken off.
    whole, in_part = classifier(), classifier(seed=9)
    whole.restore(run[0])
    in_part.init(arrays(16))
    in_part.restore(run[0], partial=True)
    for state in (run[1].state, whole.state, in_part.state):
        assert not [name for name, leaf in jax.tree.leaves_with_path(state) if leaf.committed]


@pytest.mark.parametrize(
    "only",
    [
        ("params/Dense_0",),
        ["params/Dense_0/kernel", "Dense_0/bias"],
        "params/Dense_0",
        "Dense_0",
        ("Dense_0/",),
    ],
)
def test_in_part_by_prefixes(run, only):
    logdir, made = run
    tuned = classifier(seed=9)
    fresh = plain(tuned.init(arrays(16)))
    restored = tuned.restore(logdir, partial=only)
    assert sorted(restored.loaded) == ["params/Dense_0/bias", "params/Dense_0/kernel"]
    assert "params/Dense_1/kernel: not asked for" in restored.left
    for name, leaf in plain(tuned.state.params).items():
        expected = plain(made.state.params)[name] if "Dense_0" in name else fresh[".params" + name]
        np.testing.assert_array_equal(leaf, expected)


def test_in_part_other_shapes_and_dtypes_are_left(run):
    class Other(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(nn.Dense(16, param_dtype=jnp.bfloat16)(x))
            return nn.Dense(CLASSES + 1)(x)

    tuned = classifier(model=Other(), callbacks=[])
    tuned.init(arrays(16))
    with pytest.raises(ValueError, match=r"nothing of the checkpoint in .* fits this model") as caught:
        tuned.restore(run[0], partial=True)
    assert "params/Dense_0/kernel: saved as float32[8, 16], here bfloat16[8, 16]" in str(caught.value)
    assert "params/Dense_1/bias: saved as float32[4], here float32[5]" in str(caught.value)


def test_in_part_into_a_state_of_numpy_arrays(run):
    logdir, made = run
    tuned = classifier(seed=9)
    tuned.state = jax.tree.map(
        lambda leaf: leaf if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.asarray(leaf),
        tuned.init(arrays(16)),
    )
    tuned.restore(logdir, partial=True)
    assert_equal(tuned.state.params, made.state.params)
    assert tuned.fit(data(), steps=1).step == 1


def test_in_part_needs_a_state_and_something_asked_for(run):
    with pytest.raises(RuntimeError, match=r"call trainer.init\(batch\)"):
        classifier().restore(run[0], partial=True)
    tuned = classifier()
    tuned.init(arrays(16))
    with pytest.raises(ValueError, match=r"nothing of the checkpoint in .* fits this model"):
        tuned.restore(run[0], partial=())
    for only in (("params/Dense",), ("typo", "opt_state"), ("Dense_0", "opt_state")):
        with pytest.raises(
            ValueError, match=r"beginning of no array.*begin with .*params/Dense_0.*'encoder'"
        ):
            tuned.restore(run[0], partial=only)


# States of all kinds ----------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Leaves of many dtypes, one without elements, and collections of its own."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(), (3, 2), jnp.bfloat16)
        half = self.param("half", nn.initializers.ones, (2,), jnp.float16)
        self.param("nothing", nn.initializers.zeros, (0, 4))
        count = self.variable("counters", "seen", jnp.zeros, (), jnp.int32)
        table = self.variable("tables", "flags", lambda: jnp.array([True, False, True]))
        self.variable("tables", "nothing", jnp.zeros, (2, 0), jnp.int8)
        key = self.variable("noise", "key", lambda: jax.random.key(11, impl="rbg"))
        if self.is_mutable_collection("counters") and not self.is_initializing():
            count.value += len(x)
            table.value = ~table.value
            key.value = jax.random.fold_in(key.value, count.value)
        return x @ kernel.astype(jnp.float32) * half.astype(jnp.float32)


class Squares(tk.Trainer):
    def loss(self, model, batch, ctx):
        return (model(batch["x"]) ** 2).mean(-1), {}


ROWS = {"x": np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)}


def broken_and_whole(make, batches, tmp_path, *, steps=6):
    """The states of a run that two processes made, of one that one made, and of one that restored it."""

    def fit(logdir, count):
        made = make([Checkpoint(EVERY)], logdir)
        return made.fit(batches, steps=count, resume=True).state

    whole = fit(tmp_path / "whole", steps)
    fit(tmp_path / "broken", steps // 2)
    restoring = make([], None)
    restoring.restore(tmp_path / "broken", step=steps // 2)
    return fit(tmp_path / "broken", steps), whole, restoring.fit(batches, steps=steps - steps // 2).state


def test_leaves_of_every_kind(tmp_path):
    with jax.numpy_rank_promotion("allow"):
        resumed, whole, restored = broken_and_whole(
            lambda callbacks, logdir: Squares(Odd(), optax.sgd(0.1), callbacks=callbacks, logdir=logdir),
            [ROWS],
            tmp_path,
        )
    assert_equal(resumed, whole)
    assert_equal(restored, whole)
    assert whole.collections["tables"]["nothing"].shape == (2, 0)
    assert str(whole.collections["noise"]["key"].dtype) == "key<rbg>"
    assert whole.params["kernel"].dtype == jnp.bfloat16


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=False)(x))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_of_other_generators(tmp_path, impl):
    with jax.default_prng_impl(impl):
        resumed, whole, restored = broken_and_whole(
            lambda callbacks, logdir: Squares(Dropped(), optax.sgd(0.1), callbacks=callbacks, logdir=logdir),
            [ROWS],
            tmp_path,
        )
    assert str(jax.random.key_impl(resumed.rng)) == impl
    assert_equal(resumed, whole)
    assert_equal(restored, whole)


@pytest.mark.parametrize("name", ["BiasAdderWithRunningMean", "Tracked"])
def test_statistics_that_find_their_shape_at_the_first_step(tmp_path, name):
    guide = load("params_and_state")
    model = getattr(guide, name)()

    def make(callbacks, logdir):
        return guide.SumOfSquares(model, optax.adam(0.02), callbacks=[EMA(0.5), *callbacks], logdir=logdir)

    with jax.numpy_rank_promotion("allow"):
        resumed, whole, restored = broken_and_whole(make, [guide.samples()], tmp_path)
        if name == "BiasAdderWithRunningMean":
            assert make([], None).init(guide.samples()).batch_stats["mean"].shape == (4,)
            assert resumed.batch_stats["mean"].shape == (1, 4)
    assert_equal(resumed, whole)
    assert_equal(restored, whole)


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.normal(), (None, "tensor"))
        return nn.Dense(4, kernel_init=init)(x)


def test_boxes_of_partitioned_parameters(tmp_path):
    def make(callbacks, logdir):
        made = Squares(Boxed(), optax.adam(0.1), callbacks=[EMA(0.5), *callbacks], logdir=logdir)
        if logdir is None:
            made.init(ROWS)
        return made

    resumed, whole, restored = broken_and_whole(make, [ROWS], tmp_path)
    assert isinstance(resumed.params["Dense_0"]["kernel"], nn.Partitioned)
    for part in ("params", "opt_state"):
        assert jax.tree.structure(getattr(resumed, part)) == jax.tree.structure(getattr(whole, part))
    assert_equal(resumed, whole)
    assert_equal(restored, whole)
    with pytest.raises(ValueError, match=r"not plain dicts.*call trainer.init\(batch\)"):
        Squares(Boxed(), optax.adam(0.1), callbacks=[EMA(0.5)]).restore(tmp_path / "whole")


class Scaled(tk.TrainState):
    """A state with a field of its own, which every step changes."""

    scale: jax.Array


class OwnStep(tk.Trainer):
    def train_step(self, state, batch):
        def loss(params):
            return (state.apply_fn({"params": params}, batch["x"]) ** 2).mean() * state.scale

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads, scale=state.scale * 0.5), {"loss": value}

    def loss(self, model, batch, ctx):
        return (model(batch["x"]) ** 2).mean(-1), {}


@pytest.mark.parametrize("with_key", [True, False])
def test_a_state_class_of_ones_own(tmp_path, with_key):
    model = nn.Dense(2)

    def make(callbacks, logdir):
        made = OwnStep(model, optax.adam(0.1), callbacks=[EMA(0.5), *callbacks], logdir=logdir)
        made.state = Scaled.create(
            apply_fn=model.apply,
            params=model.init(jax.random.key(1), ROWS["x"])["params"],
            tx=optax.adam(0.1),
            scale=jnp.float32(1.0),
            rng=jax.random.key(3) if with_key else None,
        )
        return made

    resumed, whole, restored = broken_and_whole(make, [ROWS], tmp_path)
    for state in (resumed, restored):
        assert isinstance(state, Scaled)
        assert float(state.scale) == 0.5**6
        assert_equal(state, whole)


def test_a_frozen_dict_and_an_optimizer_of_named_tuples(tmp_path):
    model = nn.Dense(2)
    tx = optax.inject_hyperparams(optax.adamw)(learning_rate=0.1)

    def make(callbacks, logdir):
        made = Squares(model, tx, callbacks=callbacks, logdir=logdir)
        variables = flax.core.freeze(model.init(jax.random.key(1), ROWS["x"]))
        made.state = tk.TrainState.from_variables(apply_fn=model.apply, variables=variables, tx=tx)
        return made

    resumed, whole, restored = broken_and_whole(make, [ROWS], tmp_path)
    for part in ("params", "opt_state"):
        assert jax.tree.structure(getattr(resumed, part)) == jax.tree.structure(getattr(whole, part))
    assert_equal(resumed, whole)
    assert_equal(restored, whole)


# A trainer that has no state yet --------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["fit", "evaluate", "predict"])
def test_a_checkpoint_of_another_model_is_refused_at_the_first_batch(run, use):
    logdir, _ = run
    tx = optax.adam(0.05)
    fresh = NetTrainer(Net(norm=False), tx, callbacks=[EMA(0.9)])
    fresh.restore(logdir)
    act = {
        "fit": lambda: fresh.fit(data(), steps=1),
        "evaluate": lambda: fresh.evaluate(EVAL),
        "predict": lambda: fresh.predict(EVAL),
    }[use]
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"checkpoints/9 is of another model.*params/BatchNorm_0/scale: .* absent"
        ):
            act()


class Spectral(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.SpectralNorm(nn.Dense(CLASSES))(x, update_stats=train)


def test_keys_with_a_slash_are_restored_without_a_state(tmp_path):
    made = classifier(tmp_path, model=Spectral(), callbacks=[])
    made.fit(data(), steps=2, eval_data=EVAL)
    fresh = classifier(model=Spectral(), callbacks=[])
    fresh.restore(tmp_path)
    assert_equal(fresh.state, made.state)
    assert jax.tree.structure(fresh.state.batch_stats) == jax.tree.structure(made.state.batch_stats)
    assert fresh.evaluate(EVAL) == made.evaluate(EVAL)
