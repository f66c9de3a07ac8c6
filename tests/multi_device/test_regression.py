"""`R2` is gathered and merged over eight devices as it is over batches."""

import jax
import numpy as np
import optax
import pytest
import sklearn.metrics
from clu import metrics
from flax import linen as nn

import trainkit as tk


class Height(tk.Trainer):
    metrics = metrics.Collection.create(
        loss=metrics.Average.from_output("loss"), r2=tk.metrics.R2.with_weights("size"), mae=tk.metrics.MAE
    )

    def loss(self, model, batch, ctx):
        predictions = model(batch["x"])
        outputs = {"predictions": predictions, "targets": batch["y"], "size": batch["size"]}
        return ((predictions - batch["y"]) ** 2).mean(-1), outputs


@pytest.mark.parametrize("strategy", ["jit", "vmap", "pmap", tk.parallel.Mesh(data=4, fsdp=2)])
def test_scores_are_exact(strategy):
    random = np.random.default_rng(0)
    x = random.normal(size=(37, 3)).astype(np.float32)
    y = (x[:, :2] + 100 + random.normal(size=(37, 2))).astype(np.float32)
    size = random.integers(3, size=37).astype(np.float32)
    data = tk.data.Arrays({"x": x, "y": y, "size": size}, batch_size=8)
    trainer = Height(nn.Dense(2), optax.sgd(0.1), strategy=strategy)
    params = jax.device_get(trainer.fit(data, epochs=1, eval_data=data).state.params)
    predictions = x @ np.asarray(params["kernel"]) + np.asarray(params["bias"])
    found = trainer.evaluate(data)
    np.testing.assert_allclose(
        found["r2"], sklearn.metrics.r2_score(y, predictions, sample_weight=size), rtol=1e-4
    )
    np.testing.assert_allclose(found["mae"], sklearn.metrics.mean_absolute_error(y, predictions), rtol=1e-5)
