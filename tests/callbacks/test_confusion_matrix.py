"""`ConfusionMatrix`: the counts are scikit-learn's, and the image shows them."""

import io

import flax.linen as nn
import numpy as np
import optax
import pytest
import sklearn.metrics
from matplotlib import colormaps
from PIL import Image

import trainkit as tk
from tests.helpers.writer_calls import events
from trainkit.callbacks import EMA, Checkpoint, ConfusionMatrix, Lambda
from trainkit.callbacks._confusion_matrix import draw
from trainkit.callbacks._figure import as_pixels

CLASSES = 4
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(37, 3)).astype(np.float32)
Y = RANDOM.integers(CLASSES, size=37).astype(np.int32)
DATA = tk.data.Arrays({"x": X, "y": Y}, batch_size=8)  # its last batch is padded


class Classifier(tk.Trainer):
    def loss(self, model, batch, ctx):
        logits = model(batch["x"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return losses, {"logits": logits, "labels": batch["y"]}

    def predict_step(self, model, batch, ctx):
        return model(batch["x"])


def make(*callbacks, **options):
    return Classifier(nn.Dense(CLASSES), optax.sgd(0.5), callbacks=callbacks, **options)


def by_hand(params):
    logits = X @ np.asarray(params["kernel"]) + np.asarray(params["bias"])
    return sklearn.metrics.confusion_matrix(Y, logits.argmax(-1), labels=range(CLASSES))


def shown(logdir):
    read = events(logdir)
    return {tag: [event.step for event in read.Images(tag)] for tag in read.Tags()["images"]}


@pytest.mark.parametrize("strategy", ["jit", "vmap", "pmap"])
def test_counts_are_exact_and_of_the_averaged_weights(strategy):
    averaged, live = ConfusionMatrix(DATA), ConfusionMatrix(DATA, name="live", weights="live")
    made = make(EMA(0.9), averaged, live, strategy=strategy)
    state = made.fit(DATA, epochs=2).state
    for callback, params in ((averaged, EMA.view(state).params), (live, state.params)):
        (counts,) = callback.counts.values()
        np.testing.assert_array_equal(counts, by_hand(params))
    assert (averaged.counts["confusion_matrix"] != live.counts["live"]).any()


def test_it_is_due_at_each_evaluation_else_each_epoch_else_as_told(tmp_path):
    make(ConfusionMatrix(DATA), logdir=tmp_path / "epoch").fit(DATA, epochs=2)
    make(ConfusionMatrix(DATA), logdir=tmp_path / "eval").fit(
        DATA, epochs=1, eval_data=DATA, eval_every=tk.Every(steps=2)
    )
    told = ConfusionMatrix(DATA, every=tk.At(steps=(3,)), name="mine")
    make(told, logdir=tmp_path / "told").fit(DATA, epochs=1, eval_data=DATA)
    assert shown(tmp_path / "epoch") == {"confusion_matrix": [5, 10]}
    assert shown(tmp_path / "eval") == {"confusion_matrix": [2, 4]}
    assert shown(tmp_path / "told") == {"mine": [3]}


def test_several_sources_and_other_outputs(tmp_path):
    class Named(Classifier):
        def loss(self, model, batch, ctx):
            losses, outputs = super().loss(model, batch, ctx)
            return losses, {"scores": outputs["logits"], "truth": outputs["labels"]}

    half = tk.data.Arrays({"x": X[:18], "y": Y[:18]}, batch_size=18)
    callback = ConfusionMatrix({"all": DATA, "half": half}, logits="scores", labels="truth")
    made = Named(nn.Dense(CLASSES), optax.sgd(0.5), callbacks=[callback], logdir=tmp_path)
    made.fit(DATA, epochs=1)
    assert shown(tmp_path) == {"confusion_matrix/all": [5], "confusion_matrix/half": [5]}
    assert [callback.counts[f"confusion_matrix/{name}"].sum() for name in ("all", "half")] == [37, 18]


def test_the_image_shows_the_share_of_each_class():
    counts = np.array([[9, 1, 0], [0, 0, 4], [0, 0, 0]])
    pixels = as_pixels(draw(counts, ["a", "b", "long name"])).astype(float)
    blues = [np.array(colormaps["Blues"](share)[:3]) * 255 for share in (0.9, 0.1, 1.0)]
    for color in blues:
        near = (np.abs(pixels - color).max(-1) < 1.5).sum()
        assert near > 1000, color  # the greater part of a cell
    assert pixels.shape[2] == 3


@pytest.mark.parametrize("classes", [2, 60])
def test_few_classes_have_numbers_and_many_do_not(classes):
    figure = draw(np.eye(classes, dtype=int), [str(number) for number in range(classes)])
    assert [text.get_text() for text in figure.axes[0].texts] == (["1.00"] * 2 if classes == 2 else [])
    assert figure.axes[0].get_title() == f"100.00% of {classes} right"
    height, width, _ = as_pixels(figure).shape
    assert max(height, width) <= 1200


def test_it_compiles_once_and_not_again_in_a_further_fit():
    made = make(ConfusionMatrix(DATA))
    made.fit(DATA, epochs=1)
    (other,) = made._engine.others.values()
    programs = dict(other._programs), dict(other._prepared)
    made.fit(DATA, epochs=2)
    assert (dict(other._programs), dict(other._prepared)) == programs
    assert list(made._engine.others.values()) == [other]


def test_a_resumed_run_has_each_once(tmp_path):
    def fit(*callbacks):
        saves = Checkpoint(every=tk.Every(epochs=1))
        return make(ConfusionMatrix(DATA), saves, *callbacks, logdir=tmp_path).fit(
            DATA, epochs=3, resume=True
        )

    def dies(info):
        if info.step == 12:
            raise ConnectionError

    with pytest.raises(ConnectionError):
        fit(Lambda(on_step=dies))
    fit()
    assert shown(tmp_path) == {"confusion_matrix": [5, 10, 15]}
    png = events(tmp_path).Images("confusion_matrix")[0].encoded_image_string
    assert np.asarray(Image.open(io.BytesIO(png))).ndim == 3


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"has 3 names and the logits 4 classes"):
        make(ConfusionMatrix(DATA, classes=["a", "b", "c"])).fit(DATA, epochs=1)
    with pytest.raises(
        ValueError, match=r"asks for the output 'truth', which the loss did not return.*logits"
    ):
        make(ConfusionMatrix(DATA, labels="truth")).fit(DATA, epochs=1)
    with pytest.raises(TypeError, match=r"every=3"):
        ConfusionMatrix(DATA, every=3)
    with pytest.raises(TypeError, match=r"name=''\): expected a non-empty string"):
        ConfusionMatrix(DATA, name="")
