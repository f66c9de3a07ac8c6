"""What steps take beside state and batch: frozen arrays and hyperparameters, against NumPy."""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

import trainkit as tk
from tests.helpers.compilations import count_compilations

X = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
KERNELS = [np.random.default_rng(seed).normal(size=(4, 2)).astype(np.float32) for seed in range(3)]
RATE, ALPHA = 0.1, 0.5


class Student(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.zeros, (4, 2))


class Distil(tk.Trainer):
    """Half the squared distance from what a frozen kernel gives, times `alpha`."""

    def loss(self, model, batch, ctx):
        assert set(ctx.hparams) == {"alpha", "nest"}
        target = batch["x"] @ ctx.frozen["teacher"]["kernel"]
        scale = ctx.hparams["alpha"] * ctx.hparams["nest"]["one"]
        return scale * 0.5 * ((model(batch["x"]) - target) ** 2).sum(-1), {"target": target}


class OwnSteps(Distil):
    """Takes its own step, which asks the trainer itself for the arrays."""

    def train_step(self, state, batch):
        def loss(params):
            target = batch["x"] @ self.frozen["teacher"]["kernel"]
            return ALPHA * 0.5 * ((batch["x"] @ params["kernel"] - target) ** 2).sum(-1).mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), {"loss": value}


HPARAMS = {"alpha": ALPHA, "name": "distil", "flag": True, "nest": {"one": 1, "text": "x"}}


def data():
    return tk.data.Arrays({"x": X}, batch_size=12)


def make(kernel=KERNELS[0], cls=Distil, **options):
    return cls(Student(), optax.sgd(RATE), frozen={"teacher": {"kernel": kernel}}, hparams=HPARAMS, **options)


def by_hand(*targets, start=None):
    """The kernel after one step toward each target, and the loss before each."""
    kernel = np.zeros((4, 2)) if start is None else np.asarray(start, np.float64)
    losses = []
    for target in targets:
        error = X @ (kernel - target)
        losses.append(ALPHA * 0.5 * (error**2).sum(-1).mean())
        kernel = kernel - RATE * ALPHA * X.T @ error / len(X)
    return kernel, losses


@pytest.mark.parametrize("cls", [Distil, OwnSteps])
@pytest.mark.parametrize("options", [{}, {"steps_per_call": 2}, {"remat": True}], ids=str)
def test_steps_take_frozen_arrays_and_numbers(cls, options):
    if cls is OwnSteps and "remat" in options:
        pytest.skip("a step of one's own has its own remat")
    trainer = make(cls=cls, **options)
    result = trainer.fit(data(), epochs=4)
    kernel, losses = by_hand(*[KERNELS[0]] * 4)
    np.testing.assert_allclose(result.state.params["kernel"], kernel, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.history["train/loss"][-1][1], np.mean(losses), rtol=1e-5)


def test_replaced_arrays_count_everywhere_and_nothing_compiles_again():
    trainer = make()

    def read(model, ctx):
        return ctx.frozen["teacher"]["kernel"] * ctx.hparams["alpha"]

    def go():
        trainer.fit(data(), steps=1)
        found = trainer.evaluate(data())["loss"], trainer.predict(data())["target"], trainer.apply(read)
        return trainer.state.params["kernel"], *found

    for _ in range(2):
        go()
    kernel = by_hand(*[KERNELS[0]] * 2)[0]
    # One comes from the host, one lies on a device and is tied to it.
    replacements = [(KERNELS[1], KERNELS[1]), (KERNELS[2], jax.device_put(KERNELS[2], jax.devices()[0]))]
    with count_compilations() as count:
        for new, given in replacements:
            trainer.frozen = {"teacher": {"kernel": given}}
            params, loss, target, read_back = go()
            kernel, _ = by_hand(new, start=kernel)
            np.testing.assert_allclose(params, kernel, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(loss, by_hand(new, start=kernel)[1][0], rtol=1e-5)
            np.testing.assert_allclose(target, X @ new, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(read_back, new * ALPHA, rtol=1e-6)
    assert count() == 0


def test_the_program_does_not_hold_them():
    large = np.zeros((4, 2), np.float32), np.zeros((300, 300), np.float32)
    trainer = Distil(
        Student(),
        optax.sgd(RATE),
        frozen={"teacher": {"kernel": large[0], "more": large[1]}},
        hparams=HPARAMS,
    )
    state = trainer.init({"x": X})
    text = trainer._engine.steps.trace(state, {"x": X}).lower().as_text()
    assert len(text) < large[1].nbytes / 4
    assert trainer.frozen["teacher"]["more"].shape == (300, 300)


def test_what_was_given_is_not_changed_from_outside():
    mine = KERNELS[0].copy()
    trainer = make(mine)
    mine[:] = 0
    trainer.fit(data(), steps=1)
    np.testing.assert_array_equal(trainer.frozen["teacher"]["kernel"], KERNELS[0])
    with pytest.raises(TypeError):
        trainer.frozen["teacher"] = {}
    assert trainer.hparams is HPARAMS


def test_it_is_neither_trained_nor_saved_and_others_are_refused_on_resume(tmp_path):
    def run(kernel, **options):
        trainer = make(kernel, logdir=tmp_path, callbacks=[tk.callbacks.Checkpoint()])
        return trainer, trainer.fit(data(), resume=True, **options)

    trainer, result = run(KERNELS[0], steps=2)
    assert not [
        name for name in map(str, jax.tree_util.tree_leaves_with_path(result.state)) if "teacher" in name
    ]
    np.testing.assert_array_equal(trainer.frozen["teacher"]["kernel"], KERNELS[0])
    with pytest.raises(ValueError, match=r"teacher/kernel: float32\[4, 2\] \w+ -> float32\[4, 2\] \w+"):
        run(KERNELS[1], steps=4)
    bare = Distil(
        Student(), optax.sgd(RATE), hparams=HPARAMS, logdir=tmp_path, callbacks=[tk.callbacks.Checkpoint()]
    )
    with pytest.raises((ValueError, KeyError), match="teacher"):
        bare.fit(data(), steps=4, resume=True)
    _, result = run(KERNELS[0], steps=4)
    np.testing.assert_allclose(
        result.state.params["kernel"], by_hand(*[KERNELS[0]] * 4)[0], rtol=1e-5, atol=1e-6
    )


def test_an_exported_model_has_them(tmp_path):
    trainer = make()
    trainer.init({"x": X})
    tk.export.save(tmp_path / "model.safetensors", trainer, {"x": X})
    exported = tk.export.load(tmp_path / "model.safetensors")
    np.testing.assert_allclose(exported({"x": X[:3]})["target"], X[:3] @ KERNELS[0], rtol=1e-5, atol=1e-6)


def test_a_replay_has_them(tmp_path):
    trainer = make(logdir=tmp_path, callbacks=[tk.callbacks.Checkpoint(every=tk.Every(steps=1))])
    trainer.fit(data(), steps=3)
    found = trainer.replay(3)
    np.testing.assert_allclose(found.loss, by_hand(*[KERNELS[0]] * 3)[1][-1], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"frozen": [1]}, TypeError, "mapping of names"),
        ({"frozen": {1: np.zeros(1)}}, TypeError, "names are strings"),
        ({"frozen": {"a": {"b": "text"}}}, TypeError, r"frozen/a/b is str"),
        ({"frozen": {"a": np.array(["text"])}}, TypeError, r"frozen/a is <U4"),
        ({"hparams": [1]}, TypeError, "mapping of names"),
        ({"hparams": {"a": {2: 1}}}, TypeError, "names are non-empty strings"),
    ],
)
def test_bad_input_is_refused(options, error, match):
    with pytest.raises(error, match=match):
        Distil(Student(), optax.sgd(RATE), **options)


def test_others_in_form_are_refused_by_name_and_so_is_setting_them_in_a_fit():
    trainer = make()
    with pytest.raises(ValueError, match=r"frozen/teacher/kernel: float32\[4, 2\] -> float32\[4, 3\]"):
        trainer.frozen = {"teacher": {"kernel": np.zeros((4, 3), np.float32)}}

    def act(info):
        trainer.frozen = {"teacher": {"kernel": KERNELS[1]}}

    trainer = make(callbacks=[tk.callbacks.Lambda(on_step=act)])
    with pytest.raises(RuntimeError, match=r"trainer.frozen = ... was called while"):
        trainer.fit(data(), steps=1)


def test_without_any_there_is_nothing_to_take():
    class Plain(tk.Trainer):
        def loss(self, model, batch, ctx):
            assert ctx.frozen == {}
            assert ctx.hparams == {}
            return (model(batch["x"]) ** 2).sum(-1), {}

    trainer = Plain(Student(), optax.sgd(RATE))
    trainer.fit(data(), steps=1)
    assert jax.tree.leaves(trainer._engine.held((), 0)) == []
