"""`Images`, `Text` and `Figure`: what a function returned is in TensorBoard's log, under its names and at its steps."""

import importlib.util

import jax.numpy as jnp
import matplotlib.figure
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest
from flax import linen as nn

import trainkit as tk
from tests.helpers.infos import make_info
from tests.helpers.runs import dies_at
from tests.helpers.weight import numbers, trainer
from tests.helpers.writer_calls import images, texts
from trainkit.callbacks import EMA, Checkpoint, Figure, Images, Text
from trainkit.writers import NullWriter

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), np.uint8)
TWO = numbers(1, 2)


def drawn(color="red"):
    figure = matplotlib.figure.Figure(figsize=(0.5, 0.25), dpi=40, facecolor=color)
    return figure


def test_images_are_in_the_log_at_their_steps(tmp_path):
    seen = []

    def fn(info):
        seen.append(info.step)
        return jnp.asarray(PIXELS[0]) if info.step == 2 else PIXELS

    trainer(Images(fn, every=tk.Every(steps=2), name="grid"), logdir=tmp_path).fit(TWO, epochs=2)
    found = images(tmp_path)
    assert seen == [2, 4]
    assert {tag: list(steps) for tag, steps in found.items()} == {
        "grid": [2],
        "grid/0": [4],
        "grid/1": [4],
        "grid/2": [4],
    }
    np.testing.assert_array_equal(found["grid"][2], PIXELS[0])
    np.testing.assert_array_equal(found["grid/1"][4], PIXELS[1])


def test_a_mapping_is_written_under_its_tags_after_the_name_where_there_is_one(tmp_path):
    def fn(info):
        return {"a": np.ones((2, 2, 1)), "b/c": np.zeros((2, 2, 1), np.float32)} if info.epoch > 1 else {}

    several = Images(fn), Images(fn, name="mine"), Text(lambda info: {"x": "one", "y": "*two*"}), Text(str)
    trainer(*several, Figure(lambda info: {"f": drawn()}), logdir=tmp_path).fit(TWO, epochs=2)
    found = images(tmp_path)
    assert {tag: list(steps) for tag, steps in found.items()} == {
        **{tag: [4] for tag in ("a", "b/c", "mine/a", "mine/b/c")},
        "f": [2, 4],
    }
    assert (found["a"][4].max(), found["b/c"][4].max()) == (255, 0)
    said = texts(tmp_path)
    assert {tag: list(steps) for tag, steps in said.items()} == {tag: [2, 4] for tag in ("x", "y", "text")}
    assert said["y"][2] == "*two*"


def test_a_figure_is_drawn_as_it_is_and_closed(tmp_path):
    made = []

    def fn(info):
        if info.step == 1:
            made.append(plt.figure(figsize=(1, 0.5), dpi=40, facecolor=(0, 0, 1)))
            return made[-1]
        return {"red": drawn(), "glass": drawn((1, 0, 0, 0.5))}

    before = plt.get_fignums()
    trainer(Figure(fn, every=tk.Every(steps=1)), logdir=tmp_path).fit(TWO, steps=2)
    found = images(tmp_path)
    assert found["figure"][1].shape == (20, 40, 3)
    np.testing.assert_array_equal(found["figure"][1][0, 0], [0, 0, 255])
    np.testing.assert_array_equal(found["red"][2][0, 0], [255, 0, 0])
    np.testing.assert_allclose(found["glass"][2][0, 0], [255, 127, 127], atol=1)
    assert plt.get_fignums() == before


def test_a_figure_is_closed_also_where_it_cannot_be_drawn():
    figure = plt.figure()
    figure.text(0, 0, r"$\broken{$")
    with pytest.raises(ValueError, match="broken"):
        Figure(lambda info: figure).on_step(make_info(1))
    assert not plt.fignum_exists(figure.number)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, use_bias=False, kernel_init=nn.initializers.ones)(x)


class Slope(tk.Trainer):
    def loss(self, model, batch, ctx):
        return ((model(batch["x"]) - batch["y"]) ** 2).mean(-1), {}

    def predict_step(self, model, batch, ctx):
        return model(batch["x"])


@pytest.mark.parametrize("strategy", ["jit", "vmap", "pmap"])
def test_the_averaged_weights_are_shown_unless_told_otherwise(strategy):
    x = np.ones((4, 1), np.float32)
    data = [{"x": x, "y": 3 * x}]
    seen = {}

    def fn(info):
        for weights in ("averaged", "live"):
            chosen = {} if weights == "averaged" else {"weights": weights}
            seen[weights] = (
                float(info.apply(slope, x, **chosen)[0, 0]),
                float(info.predict(data, **chosen)[0, 0]),
            )
        return "seen"

    def slope(model, x):
        return model(x)

    made = Slope(Net(), optax.sgd(0.25), strategy=strategy, callbacks=[EMA(0.5), Text(fn)])
    made.fit(data, epochs=1)
    # By hand: w = 1 - 0.25 * 2 * (1 - 3) = 2, the average 0.5 * 1 + 0.5 * 2.
    assert seen == {"averaged": (1.5, 1.5), "live": (2.0, 2.0)}


def test_a_resumed_run_shows_each_step_once(tmp_path):
    def fit(*callbacks, **options):
        shown = (
            Images(lambda info: np.full((2, 2, 1), 20 * info.step, np.uint8), every=tk.Every(steps=1)),
            Text(lambda info: str(info.step), every=tk.Every(steps=1)),
        )
        saves = Checkpoint(every=tk.Every(steps=2))
        return trainer(*shown, saves, *callbacks, logdir=tmp_path).fit(numbers(1, 2, 3, 4, 5), **options)

    with pytest.raises(ConnectionError):
        fit(dies_at(4), epochs=1)
    fit(epochs=1, resume=True)
    assert [*images(tmp_path)["images"]] == [1, 2, 3, 4, 5]
    assert texts(tmp_path)["text"] == {step: str(step) for step in range(1, 6)}


@pytest.mark.parametrize(
    ("fn", "error", "message"),
    [
        (
            lambda info: None,
            TypeError,
            r"'images' is NoneType; fn returns an array \[H, W, C\] or \[N, H, W, C\]",
        ),
        (lambda info: {"a": None}, TypeError, "'a' is NoneType"),
        (lambda info: "cat.png", TypeError, "'images' is str"),
        (lambda info: np.zeros((8, 8)), ValueError, r"shape \[8, 8\].*images\[..., None\]"),
        (lambda info: np.zeros((8, 8, 2)), ValueError, r"shape \[8, 8, 2\]; fn returns"),
        (lambda info: np.zeros((0, 8, 8, 3)), ValueError, r"shape \[0, 8, 8, 3\]"),
        (lambda info: {3: PIXELS}, TypeError, "the key 3; the tags of a log are non-empty strings"),
    ],
)
def test_what_is_no_image_is_refused(fn, error, message):
    with pytest.raises(error, match=message):
        Images(fn).on_step(make_info(1))


def test_what_is_no_text_or_figure_is_refused():
    with pytest.raises(TypeError, match=r"Text: 'text' is list; fn returns a string.*join"):
        Text(lambda info: ["a", "b"]).on_step(make_info(1))
    with pytest.raises(TypeError, match=r"Text: 'text' is NoneType"):
        Text(lambda info: None).on_step(make_info(1))
    with pytest.raises(
        TypeError, match=r"'figure' is NoneType; fn returns a matplotlib.figure.Figure.*return figure"
    ):
        Figure(lambda info: None).on_step(make_info(1))
    with pytest.raises(TypeError, match=r"'figure' is Axes.*axes.figure"):
        Figure(lambda info: drawn().add_subplot()).on_step(make_info(1))


@pytest.mark.parametrize("callback", [Images, Text, Figure])
def test_arguments_are_checked(callback):
    with pytest.raises(TypeError, match=rf"{callback.__name__}\('f'\): expected a function, fn\(info\)"):
        callback("f")
    with pytest.raises(TypeError, match=r"every=5.*tk\.Every"):
        callback(str, every=5)
    with pytest.raises(TypeError, match=r"name='': expected a non-empty string|name=''\): expected"):
        callback(str, name="")
    assert callback(str).every == tk.Every(epochs=1)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else found(name, *rest)
    )
    with pytest.raises(ImportError, match=r"Figure draws with matplotlib.*trainkit\[media\]"):
        Figure(str)


def test_two_that_write_one_name_at_one_step_are_named():
    with pytest.raises(ValueError, match=r"'images' was written twice at step 2.*Images \(number"):
        trainer(Images(lambda info: PIXELS), Images(lambda info: PIXELS), writers=[NullWriter()]).fit(
            TWO, epochs=1
        )
