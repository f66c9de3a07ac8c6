"""Rules that every metric obeys. A new metric joins with one line in `REGISTRY`."""

import functools

import clu.metrics
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainkit.metrics import (
    F1,
    MAE,
    MSE,
    R2,
    ROCAUC,
    Accuracy,
    ConfusionMatrix,
    Mean,
    Perplexity,
    Precision,
    Recall,
    Spearman,
    Std,
    TopKAccuracy,
    collecting,
)

CLASSES = 5

# By name: the class, and the outputs that a batch of `rows` gives it.
REGISTRY = {
    "std": (Std.from_output("loss"), ("loss",)),
    "std of tokens": (Std.from_output("token_losses"), ("token_losses",)),
    "perplexity": (Perplexity, ("loss",)),
    "perplexity of tokens": (
        Perplexity.from_outputs("token_losses", "token_mask"),
        ("token_losses", "token_mask"),
    ),
    "weighted perplexity of tokens": (
        Perplexity.from_outputs("token_losses", weights="token_weights"),
        ("token_losses", "token_weights"),
    ),
    "mean": (Mean, ("loss",)),
    "mean of tokens": (Mean.from_output("token_losses"), ("token_losses",)),
    "weighted mean": (Mean.from_output("loss", weights="weight"), ("loss", "weight")),
    "weighted mean of tokens": (
        Mean.from_output("token_losses", weights="token_weights"),
        ("token_losses", "token_weights"),
    ),
    "accuracy of tokens": (Accuracy, ("token_logits as logits", "token_labels as labels")),
    "weighted accuracy of tokens": (
        Accuracy.with_weights("token_weights"),
        ("token_logits as logits", "token_labels as labels", "token_weights"),
    ),
    "top 2": (TopKAccuracy.with_k(2), ("logits", "labels")),
    "top 5": (TopKAccuracy, ("logits", "labels")),
    "top 2 of tokens": (TopKAccuracy.with_k(2), ("token_logits as logits", "token_labels as labels")),
    "confusion": (ConfusionMatrix.of(CLASSES), ("logits", "labels")),
    "confusion of tokens": (
        ConfusionMatrix.of(CLASSES),
        ("token_logits as logits", "token_labels as labels"),
    ),
    "precision": (Precision.of(CLASSES), ("logits", "labels")),
    "recall": (Recall.of(CLASSES), ("logits", "labels")),
    "f1": (F1.of(CLASSES), ("logits", "labels")),
    "roc auc": (ROCAUC, ("scores", "binary as labels")),
    "roc auc of logits": (ROCAUC, ("binary_logits as logits", "binary as labels")),
    "mae": (MAE, ("predictions", "targets")),
    "weighted mse": (MSE.with_weights("weight"), ("predictions", "targets", "weight")),
    "mse of columns": (MSE, ("columns as predictions", "token_losses as targets")),
    "r2": (R2, ("predictions", "loss as labels")),
    "weighted r2": (R2.with_weights("weight"), ("predictions", "targets", "weight")),
    "weighted r2 of tokens": (
        R2.with_weights("token_weights"),
        ("columns as predictions", "token_losses as targets", "token_weights"),
    ),
    "spearman": (Spearman, ("predictions", "targets")),
    "spearman of columns": (Spearman, ("columns as predictions", "token_losses as targets")),
    "median": (collecting(["loss"], lambda rows: np.median(rows["loss"])), ("loss",)),
}
ON_DEVICE = [n for n, (m, _) in REGISTRY.items() if not issubclass(m, clu.metrics.CollectingMetric)]


def everything(rows, seed=0):
    draw = np.random.default_rng(seed)
    time = 3
    return {
        "loss": draw.gamma(2.0, size=rows).astype(np.float32),
        "token_losses": draw.gamma(2.0, size=(rows, time)).astype(np.float32),
        "weight": draw.integers(4, size=rows).astype(np.float32),
        "token_weights": draw.integers(4, size=(rows, time)).astype(np.float32),
        "token_mask": draw.random((rows, time)) < 0.7,
        "predictions": draw.normal(size=rows).astype(np.float32),
        "targets": draw.normal(size=rows).astype(np.float32),
        "columns": draw.normal(size=(rows, time)).astype(np.float32),
        "logits": draw.normal(size=(rows, CLASSES)).astype(np.float32),
        "labels": draw.integers(CLASSES, size=rows).astype(np.int32),
        "token_logits": draw.normal(size=(rows, time, CLASSES)).astype(np.float32),
        "token_labels": draw.integers(CLASSES, size=(rows, time)).astype(np.int32),
        "scores": draw.integers(6, size=rows).astype(np.float32),
        "binary": draw.integers(2, size=rows).astype(np.int32),
        "binary_logits": draw.normal(size=(rows, 2)).astype(np.float32),
    }


def outputs_of(name, rows, seed=0):
    there = everything(rows, seed)
    pairs = [(word.split(" as ")[0], word.split(" as ")[-1]) for word in REGISTRY[name][1]]
    return {target: there[source] for source, target in pairs}


def part(outputs, rows):
    return {name: value[rows] for name, value in outputs.items()}


@functools.cache
def compiled(name):
    # Compiled once for each shape; test_jit_equals_eager is the one that compares.
    return jax.jit(lambda outputs: REGISTRY[name][0].from_model_output(**outputs))


def make(name, outputs, **more):
    return compiled(name)(outputs | more)


def assert_same_value(actual, expected, rtol=1e-6):
    actual, expected = np.asarray(actual.compute()), np.asarray(expected.compute())
    assert actual.shape == expected.shape
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(actual, expected, rtol=rtol)


def assert_same_state(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


every_metric = pytest.mark.parametrize("name", REGISTRY)
every_device_metric = pytest.mark.parametrize("name", ON_DEVICE)


@every_metric
def test_uneven_parts_merge_to_the_whole(name):
    outputs = outputs_of(name, 24)
    parts = [make(name, part(outputs, rows)) for rows in (slice(0, 1), slice(1, 8), slice(8, 24))]
    merged = functools.reduce(lambda a, b: a.merge(b), parts)
    assert_same_value(merged, make(name, outputs), rtol=2e-6)


@every_metric
def test_merge_is_associative(name):
    a, b, c = (make(name, outputs_of(name, rows, seed=rows)) for rows in (11, 3, 6))
    assert_same_value(a.merge(b).merge(c), a.merge(b.merge(c)), rtol=2e-6)


@every_metric
def test_empty_is_an_exact_identity(name):
    batch, empty = make(name, outputs_of(name, 9)), REGISTRY[name][0].empty()
    assert_same_state(empty.merge(batch), batch)
    assert_same_state(batch.merge(empty), batch)


@every_metric
def test_masked_rows_count_as_if_they_were_not_there_and_may_hold_nan(name):
    outputs = outputs_of(name, 16)
    mask = np.arange(16) % 3 != 1
    spoilt = {
        key: np.where(mask.reshape((-1,) + (1,) * (value.ndim - 1)), value, np.nan)
        if value.dtype == np.float32
        else value
        for key, value in outputs.items()
    }
    assert_same_value(make(name, spoilt, mask=mask), make(name, part(outputs, mask)), rtol=2e-6)


@every_metric
def test_a_batch_of_masked_rows_changes_nothing(name):
    outputs = outputs_of(name, 8)
    nothing = make(name, outputs_of(name, 4, seed=1), mask=np.zeros(4, bool))
    assert_same_value(make(name, outputs).merge(nothing), make(name, outputs), rtol=0)


@every_metric
def test_a_metric_of_nothing_is_nan_or_zero_counts(name):
    value = np.asarray(make(name, outputs_of(name, 4), mask=np.zeros(4, bool)).compute())
    assert np.isnan(value).all() if value.ndim == 0 else not value.any()


@every_device_metric
def test_jit_equals_eager(name):
    outputs = outputs_of(name, 16)
    eager = REGISTRY[name][0].from_model_output(**jax.tree.map(jnp.asarray, outputs))
    merged = jax.jit(lambda x, y: make(name, x).merge(make(name, y)))(outputs, outputs)
    assert_same_value(merged, eager.merge(eager))


@every_device_metric
def test_merge_in_a_scan_equals_the_whole(name):
    metric = REGISTRY[name][0]
    outputs = outputs_of(name, 24)
    stacked = {key: value.reshape(4, 6, *value.shape[1:]) for key, value in outputs.items()}
    merged, _ = jax.lax.scan(lambda c, x: (c.merge(make(name, x)), None), metric.empty(), stacked)
    assert_same_value(merged, make(name, outputs), rtol=2e-6)


@every_metric
@pytest.mark.parametrize("map_over", [jax.vmap, jax.pmap])
def test_gather_over_an_axis_equals_the_whole(name, map_over):
    shards = 4 if map_over is jax.vmap else jax.local_device_count()
    outputs = outputs_of(name, 24)
    sharded = {key: value.reshape(shards, -1, *value.shape[1:]) for key, value in outputs.items()}
    collection = clu.metrics.Collection.create(metric=REGISTRY[name][0])
    gather = map_over(lambda x: collection.gather_from_model_output(axis_name="axis", **x), axis_name="axis")
    assert_same_value(gather(sharded).unreplicate().metric, make(name, outputs), rtol=2e-6)


@every_device_metric
def test_merge_and_compute_keep_64_bits_on_the_host(name):
    def widened(leaf):
        return np.asarray(leaf, np.float64 if jnp.issubdtype(leaf.dtype, jnp.floating) else np.int64)

    whole = jax.tree.map(widened, make(name, outputs_of(name, 16)))
    merged = whole.merge(whole)
    assert {leaf.dtype.itemsize for leaf in jax.tree.leaves(merged)} == {8}
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(merged))
    assert not isinstance(merged.compute(), jax.Array)
    assert merged.compute().dtype in (np.float64, np.int64)
    np.testing.assert_allclose(
        merged.compute(), whole.compute() * (2 if "confusion" in name else 1), rtol=1e-12
    )


@every_device_metric
def test_works_under_strict_dtype_promotion(name, strict_dtypes):
    outputs = outputs_of(name, 8)
    merged = jax.jit(lambda x: REGISTRY[name][0].empty().merge(make(name, x)))(outputs)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(merged))


@every_device_metric
def test_empty_can_be_donated(name):
    step = jax.jit(lambda state, outputs: state.merge(make(name, outputs)), donate_argnums=0)
    outputs = outputs_of(name, 8)
    assert_same_value(step(REGISTRY[name][0].empty(), outputs), make(name, outputs))


@every_metric
def test_is_usable_in_a_collection_beside_clus_own(name):
    collection = clu.metrics.Collection.create(
        metric=REGISTRY[name][0], loss=clu.metrics.Average.from_output("loss")
    )
    outputs = {"loss": np.float32(2.0), **outputs_of(name, 8)}
    merged = collection.empty().merge(
        collection.single_from_model_output(**jax.tree.map(jnp.asarray, outputs))
    )
    values = merged.compute()
    assert list(values) == ["metric", "loss"]
    np.testing.assert_allclose(values["loss"], np.mean(outputs["loss"]), rtol=1e-6)
