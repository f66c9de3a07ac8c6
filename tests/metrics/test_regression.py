"""`MAE`, `MSE`, `R2` and `Spearman`, against scikit-learn and SciPy."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
import sklearn.metrics
from clu import metrics
from flax import linen as nn

import trainkit as tk
from trainkit.metrics import MAE, MSE, R2, Accumulator, Spearman

SKLEARN = {
    MAE: sklearn.metrics.mean_absolute_error,
    MSE: sklearn.metrics.mean_squared_error,
    R2: sklearn.metrics.r2_score,
}
each = pytest.mark.parametrize("metric", SKLEARN)


def draw(rows=50, columns=None, *, offset=0.0, seed=0):
    """Returns predictions and targets that have something in common, and integer weights, some of them 0."""
    random = np.random.default_rng(seed)
    shape = (rows,) if columns is None else (rows, columns)
    targets = random.normal(size=shape) * (1 if columns is None else 1 + np.arange(columns))
    predictions = targets + random.normal(size=shape)
    weights = random.integers(4, size=rows).astype(np.float32)
    return (predictions + offset).astype(np.float32), (targets + offset).astype(np.float32), weights


def reference(metric, predictions, targets, weights=None):
    wide = [array.astype(np.float64) for array in (targets, predictions)]
    return SKLEARN[metric](*wide, sample_weight=weights)


def in_batches(metric, size, mask=None, **outputs):
    """Merges what batches of `size` rows give, as a fit does: on the device in float32, then on the host."""
    rows = len(outputs["predictions"])
    parts = []
    for start in range(0, rows, size):
        part = {name: jnp.asarray(value[start : start + size]) for name, value in outputs.items()}
        parts.append(
            metric.from_model_output(**part, mask=None if mask is None else mask[start : start + size])
        )
    return float(functools.reduce(lambda a, b: a.merge(b), parts, metric.empty()).compute())


@each
@pytest.mark.parametrize("columns", [None, 1, 3])
@pytest.mark.parametrize("size", [1, 7, 50])
def test_equals_scikit_learn(metric, columns, size):
    predictions, targets, weights = draw(columns=columns)
    found = in_batches(metric, size, predictions=predictions, targets=targets)
    np.testing.assert_allclose(found, reference(metric, predictions, targets), rtol=2e-6)
    found = in_batches(
        metric.with_weights("weight"), size, predictions=predictions, targets=targets, weight=weights
    )
    np.testing.assert_allclose(found, reference(metric, predictions, targets, weights), rtol=2e-6)


@each
def test_masked_rows_and_rows_of_weight_0_may_hold_anything(metric):
    predictions, targets, weights = draw(columns=2)
    mask = np.arange(50) % 5 != 1
    kept = mask & (weights > 0)
    predictions[~kept], targets[~kept] = np.nan, np.inf
    weights[~mask] = np.nan
    found = in_batches(metric.with_weights("w"), 8, mask, predictions=predictions, targets=targets, w=weights)
    expected = reference(metric, predictions[kept], targets[kept], weights[kept])
    np.testing.assert_allclose(found, expected, rtol=2e-6)


@each
def test_weights_of_elements_make_rows_of_them(metric):
    predictions, targets, _ = draw(20, 6)
    weights = np.random.default_rng(1).integers(3, size=(20, 3)).astype(np.float32)
    shaped = [array.reshape(20, 3, 2) for array in (predictions, targets)]
    found = metric.with_weights("w").from_model_output(predictions=shaped[0], targets=shaped[1], w=weights)
    flat = [array.reshape(60, 2) for array in shaped]
    np.testing.assert_allclose(found.compute(), reference(metric, *flat, weights.reshape(-1)), rtol=2e-6)


@each
@pytest.mark.parametrize("size", [1, 13, 1000])
def test_a_large_offset_loses_nothing(metric, size):
    predictions, targets, weights = draw(1000, 2, offset=1e6)
    outputs = {"predictions": predictions, "targets": targets, "weight": weights}
    # What float32 holds of the data is what the reference is given, too.
    expected = reference(metric, predictions, targets, weights)
    np.testing.assert_allclose(
        in_batches(metric.with_weights("weight"), size, **outputs), expected, rtol=1e-5
    )
    expected = reference(metric, predictions, targets)
    del outputs["weight"]
    np.testing.assert_allclose(in_batches(metric, size, **outputs), expected, rtol=1e-5)


def test_r2_of_batches_far_from_each_other():
    random = np.random.default_rng(0)
    targets = np.concatenate([random.normal(size=64) + at for at in (-1e6, 0, 1e6, 3)]).astype(np.float32)
    predictions = (targets + random.normal(size=256)).astype(np.float32)
    found = in_batches(R2, 64, predictions=predictions, targets=targets)
    np.testing.assert_allclose(found, reference(R2, predictions, targets), atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e6 + 0.3])
@pytest.mark.parametrize("error", [0.0, 1.0])
def test_r2_of_constant_targets(value, error):
    targets = np.full(30, value, np.float32)
    predictions = targets + np.float32(error)
    for size in (1, 7, 30):
        found = in_batches(R2, size, predictions=predictions, targets=targets)
        assert found == reference(R2, predictions, targets) == (0.0 if error else 1.0)


def test_r2_of_fewer_than_two_rows_is_nan():
    predictions, targets, _ = draw(1)
    assert np.isnan(in_batches(R2, 1, predictions=predictions, targets=targets))
    predictions, targets, weights = draw(3)
    weights[1:] = 0
    found = in_batches(
        R2.with_weights("w"), 3, predictions=predictions, targets=targets, w=np.maximum(weights, [1, 0, 0])
    )
    assert np.isnan(found)


@each
def test_nan_in_the_data_is_nan(metric):
    predictions, targets, _ = draw(8)
    targets[5] = np.nan
    assert np.isnan(in_batches(metric, 4, predictions=predictions, targets=targets))


@pytest.mark.parametrize("columns", [None, 3])
@pytest.mark.parametrize("size", [1, 7, 50])
def test_spearman_equals_scipy_with_ties(columns, size):
    predictions, targets, _ = draw(columns=columns)
    predictions, targets = predictions.round(), targets.round()
    assert len(np.unique(targets)) < 15
    pairs = zip(predictions.reshape(50, -1).T, targets.reshape(50, -1).T, strict=True)
    expected = np.mean([scipy.stats.spearmanr(one, other).statistic for one, other in pairs])
    found = in_batches(Spearman, size, np.ones(50, bool), predictions=predictions, targets=targets)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_spearman_leaves_masked_rows_out():
    predictions, targets, _ = draw()
    mask = np.arange(50) % 3 > 0
    targets[~mask] = np.nan
    expected = scipy.stats.spearmanr(predictions[mask], targets[mask]).statistic
    found = in_batches(Spearman, 9, mask, predictions=predictions, targets=targets)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_spearman_of_what_has_no_ranks_is_nan():
    for targets in ([1.0, 1.0, 1.0], [1.0, np.nan, 2.0]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert np.isnan(scipy.stats.spearmanr([1, 2, 3], targets).statistic)
        found = Spearman.from_model_output(predictions=jnp.arange(3.0), targets=jnp.array(targets))
        assert np.isnan(found.compute())
    assert np.isnan(Spearman.from_rows({"predictions": np.ones(1), "targets": np.ones(1)}))


every = pytest.mark.parametrize("metric", [*SKLEARN, Spearman])


@every
def test_labels_stand_in_for_targets_and_other_outputs_can_be_named(metric):
    predictions, targets, _ = draw(20)
    other = jnp.zeros(20)
    usual = metric.from_model_output(predictions=predictions, targets=targets, labels=other).compute()
    assert float(metric.from_model_output(predictions=predictions, labels=targets).compute()) == float(usual)
    named = metric.from_outputs("height", "measured")
    assert (
        float(named.from_model_output(height=predictions, measured=targets, targets=other).compute()) == usual
    )


@every
def test_a_column_of_predictions_beside_plain_targets(metric):
    predictions, targets, _ = draw(20)
    plain = float(metric.from_model_output(predictions=predictions, targets=targets).compute())
    column = metric.from_model_output(predictions=predictions[:, None], targets=targets)
    assert float(column.compute()) == plain


@each
@pytest.mark.parametrize("dtype", [np.int32, jnp.bfloat16, np.float16])
def test_other_dtypes_are_compared_in_float32(metric, dtype):
    targets = np.arange(10).astype(dtype)
    predictions = np.arange(10)[::-1].astype(np.float32)
    found = metric.from_model_output(predictions=jnp.asarray(predictions), targets=jnp.asarray(targets))
    np.testing.assert_allclose(found.compute(), reference(metric, predictions, targets), rtol=1e-6)


@each
def test_what_does_not_fit_is_refused(metric):
    one = jnp.ones(4)
    with pytest.raises(
        ValueError, match=rf"{metric.__name__} got predictions of shape \[4, 2\] and targets of"
    ):
        metric.from_model_output(predictions=jnp.ones((4, 2)), targets=one)
    with pytest.raises(ValueError, match=r"shape \[\].*Allowed are two arrays of one shape \[batch"):
        metric.from_model_output(predictions=jnp.ones(()), targets=jnp.ones(()))
    with pytest.raises(ValueError, match=r"got weights 'w' of shape \[3\] for predictions of shape \[4\]"):
        metric.with_weights("w").from_model_output(predictions=one, targets=one, w=jnp.ones(3))
    with pytest.raises(TypeError, match="real numbers, got complex64"):
        metric.from_model_output(predictions=one.astype(jnp.complex64), targets=one)
    collection = metrics.Collection.create(score=metric)
    spec = jax.ShapeDtypeStruct((4,), jnp.float32)
    with pytest.raises(ValueError, match=r"'score' \(\w+\) asks for the output 'targets'.*There are: loss"):
        Accumulator(collection).specify(loss=spec, predictions=spec, mask=spec)


class Height(tk.Trainer):
    metrics = metrics.Collection.create(
        loss=metrics.Average.from_output("loss"),
        mae=MAE,
        mse=MSE.with_weights("size"),
        r2=R2,
        rank=Spearman,
    )

    def loss(self, model, batch, ctx):
        # For a batch and, under "vmap", for one example.
        predictions = model(batch["x"])
        return ((predictions - batch["y"]) ** 2).mean(-1), {
            "predictions": predictions,
            "targets": batch["y"],
            "size": batch["size"],
        }


@pytest.mark.parametrize("strategy", ["jit", "vmap", "pmap"])
def test_an_evaluation_is_exact_under_every_strategy(strategy):
    random = np.random.default_rng(0)
    x = random.normal(size=(37, 3)).astype(np.float32)
    y = (x[:, :2] + 1e3 + random.normal(size=(37, 2))).astype(np.float32)
    size = random.integers(3, size=37).astype(np.float32)
    data = tk.data.Arrays({"x": x, "y": y, "size": size}, batch_size=8)
    stop = tk.callbacks.EarlyStopping("eval/r2", patience=3)  # its direction is registered
    trainer = Height(nn.Dense(2), optax.sgd(0.1), strategy=strategy, callbacks=[stop])
    result = trainer.fit(data, epochs=1, eval_data=data)
    params = jax.device_get(result.state.params)
    predictions = x @ np.asarray(params["kernel"]) + np.asarray(params["bias"])
    found = trainer.evaluate(data)
    np.testing.assert_allclose(found["mae"], reference(MAE, predictions, y), rtol=1e-5)
    np.testing.assert_allclose(found["mse"], reference(MSE, predictions, y, size), rtol=1e-5)
    np.testing.assert_allclose(found["r2"], reference(R2, predictions, y), rtol=1e-4)
    ranks = [scipy.stats.spearmanr(predictions[:, i], y[:, i]).statistic for i in range(2)]
    np.testing.assert_allclose(found["rank"], np.mean(ranks), atol=1e-3)
    assert {"train/mae", "train/r2", "eval/rank"} <= result.history.keys()


def test_the_weights_of_a_weighted_loss_and_ranges_without_any():
    class Weighted(tk.Trainer):
        metrics = metrics.Collection.create(
            loss=metrics.Average.from_output("loss"),
            r2=R2.with_weights("weight"),
            mae=MAE.with_weights("weight"),
        )

        def loss(self, model, batch, ctx):
            predictions = model(batch["x"])[:, 0]
            outputs = {"predictions": predictions, "targets": batch["y"]}
            return tk.Weighted((predictions - batch["y"]) ** 2, batch["w"]), outputs

    x, y, w = (np.random.default_rng(seed).random(12).astype(np.float32) for seed in (1, 2, 3))
    w[::3] = 0
    data = tk.data.Arrays({"x": x[:, None], "y": y, "w": w}, batch_size=5)
    log = tk.callbacks.LogMetrics(every=tk.Every(steps=1))
    trainer = Weighted(nn.Dense(1), optax.sgd(0.0), callbacks=[log])
    nothing = [{"x": x[:4, None], "y": y[:4], "w": np.zeros(4, np.float32)}]
    result = trainer.fit([*nothing, data.tree], epochs=1)
    predictions = x * float(result.state.params["kernel"][0, 0])
    found = trainer.evaluate(data)
    np.testing.assert_allclose(found["r2"], reference(R2, predictions, y, w), rtol=1e-4)
    np.testing.assert_allclose(found["mae"], reference(MAE, predictions, y, w), rtol=1e-5)
    assert {name: [step for step, _ in result.history[name]] for name in ("train/r2", "train/mae")} == {
        "train/r2": [2],
        "train/mae": [2],
    }
