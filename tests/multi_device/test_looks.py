"""What people look at, over eight devices: exact counts, layers that are divided, images and vectors of the model."""

import numpy as np
import optax
import pytest
import sklearn.metrics
from flax import linen as nn

import trainkit as tk
from tests.helpers.writer_calls import images, texts

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(37, 8)).astype(np.float32)
Y = RANDOM.integers(4, size=37).astype(np.int32)
DATA = tk.data.Arrays({"x": X, "y": Y}, batch_size=16)


class Classifier(tk.Trainer):
    def loss(self, model, batch, ctx):
        logits = model(batch["x"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return losses, {"logits": logits, "labels": batch["y"]}


def kernel(model):
    return model.variables["params"]["kernel"]


@pytest.mark.parametrize("strategy", ["jit", "vmap", "pmap", tk.parallel.Mesh(data=4, fsdp=2)])
def test_every_strategy_shows_the_same(strategy, tmp_path):
    counted = tk.callbacks.ConfusionMatrix(DATA)
    shown = [
        tk.callbacks.Images(lambda info: 0.5 + 0.1 * np.tanh(info.apply(kernel))[..., None]),
        tk.callbacks.Embedding(lambda info: (info.predict(DATA)["logits"], Y)),
        tk.callbacks.ModelSummary(),
        counted,
    ]
    made = Classifier(
        nn.Dense(4), optax.sgd(0.5), callbacks=shown, strategy=strategy, logdir=tmp_path, hparams={"width": 4}
    )
    params = made.fit(DATA, epochs=1).state.params
    weights, bias = np.asarray(params["kernel"]), np.asarray(params["bias"])
    logits = X @ weights + bias
    np.testing.assert_array_equal(
        counted.counts["confusion_matrix"], sklearn.metrics.confusion_matrix(Y, logits.argmax(-1))
    )
    (pixels,) = images(tmp_path)["images"].values()
    np.testing.assert_allclose(pixels[..., 0], np.rint(255 * (0.5 + 0.1 * np.tanh(weights))), atol=1)
    vectors = np.loadtxt(next((tmp_path / "projector").glob("*/*/tensors.tsv")), np.float32)
    np.testing.assert_allclose(vectors, logits, rtol=1e-4, atol=1e-5)
    ((_, table),) = texts(tmp_path)["model_summary"].items()
    divided = isinstance(strategy, tk.parallel.Mesh)
    assert ("| sharding | bytes per device |" in table) == divided
    row = next(line for line in table.splitlines() if "| Dense |" in line)
    assert f"| {2 * 16 * 8 * 4 + 16 * 4} |".replace("1088", "1,088") in row
    if divided:
        assert "fsdp" in row
        assert row.rstrip(" |").endswith(" 72")  # half of the kernel's and the bias' 36 numbers
