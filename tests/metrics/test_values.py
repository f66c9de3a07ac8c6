"""The metrics' values, against NumPy and scikit-learn."""

import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from trainkit.metrics import (
    F1,
    Accumulator,
    Accuracy,
    ConfusionMatrix,
    Mean,
    Perplexity,
    Precision,
    Recall,
    Std,
    TopKAccuracy,
    means,
)


def classification(rows=200, classes=6, seed=0):
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(rows, classes)).astype(np.float32)
    return logits, draw.integers(classes, size=rows).astype(np.int32)


def test_std_is_the_population_standard_deviation():
    values = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    metric = Std.from_output("loss").from_model_output(loss=values)
    np.testing.assert_allclose(metric.compute(), values.std(), rtol=1e-5)


def test_std_of_a_scalar_output_is_over_batches():
    spread = Std.from_output("norm")
    merged = spread.empty()
    for norm in (1.0, 2.0, 6.0):
        merged = merged.merge(spread.from_model_output(norm=jnp.float32(norm)))
    np.testing.assert_allclose(merged.compute(), np.std([1.0, 2.0, 6.0]), rtol=1e-6)


def test_std_survives_a_mean_much_larger_than_the_spread():
    # Sums of squares in float32 would leave nothing of a spread of 1 around 10 000.
    values = (1e4 + np.random.default_rng(0).normal(size=(20, 64))).astype(np.float32)
    merged = Std.empty()
    for batch in values:
        merged = merged.merge(Std.from_model_output(batch))
    np.testing.assert_allclose(merged.compute(), values.astype(np.float64).std(), rtol=1e-3)


def test_std_accumulates_half_precision_in_float32():
    values = jnp.linspace(0, 1, 300, dtype=jnp.bfloat16)
    metric = Std.from_model_output(values)
    assert metric.mean.dtype == metric.m2.dtype == jnp.float32
    np.testing.assert_allclose(metric.compute(), np.asarray(values, np.float64).std(), rtol=1e-5)


def test_std_takes_integers():
    np.testing.assert_allclose(Std.from_model_output(jnp.arange(5)).compute(), np.arange(5).std(), rtol=1e-6)


@pytest.mark.parametrize("mask", [np.ones(3, bool), np.ones((4, 3), bool), np.ones((4, 2, 1), bool)])
def test_a_mask_of_another_shape_is_refused(mask):
    with pytest.raises(ValueError, match=r"got a mask of shape .* for values of shape \(4, 2\)"):
        Std.from_model_output(jnp.ones((4, 2)), mask=mask)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_top_k_equals_scikit_learn(k):
    logits, labels = classification()
    expected = (np.argsort(-logits, axis=-1)[:, :k] == labels[:, None]).any(-1).mean()
    if k < 6:
        reference = sklearn.metrics.top_k_accuracy_score(labels, logits, k=k, labels=np.arange(6))
        assert expected == pytest.approx(reference)
    metric = TopKAccuracy.with_k(k).from_model_output(logits=jnp.asarray(logits), labels=jnp.asarray(labels))
    np.testing.assert_allclose(metric.compute(), expected, rtol=1e-6)


def test_top_k_ranks_ties_by_class_index():
    logits = jnp.zeros((4, 4))
    metric = TopKAccuracy.with_k(2).from_model_output(logits=logits, labels=jnp.arange(4))
    assert float(metric.compute()) == 0.5


def test_top_1_is_argmax_with_ties_and_nan():
    draw = np.random.default_rng(0)
    logits = draw.integers(3, size=(200, 4)).astype(np.float32)
    logits[draw.random((200, 4)) < 0.1] = np.nan
    labels = draw.integers(4, size=200).astype(np.int32)
    # A label whose own logit is NaN is wrong by definition, though NumPy's argmax points at it.
    own = logits[np.arange(200), labels]
    expected = ((logits.argmax(-1) == labels) & ~np.isnan(own)).mean()
    metric = TopKAccuracy.with_k(1).from_model_output(logits=jnp.asarray(logits), labels=jnp.asarray(labels))
    np.testing.assert_allclose(metric.compute(), expected, rtol=1e-6)


@pytest.mark.parametrize("label", [-1, 3, 100])
def test_top_k_counts_a_label_outside_of_the_classes_as_wrong(label):
    metric = TopKAccuracy.with_k(3).from_model_output(logits=jnp.ones((2, 3)), labels=jnp.array([label, 0]))
    assert float(metric.compute()) == 0.5


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.int32])
def test_top_k_takes_every_integer_dtype(dtype):
    logits, labels = classification(20)
    metric = TopKAccuracy.with_k(2).from_model_output(logits=jnp.asarray(logits), labels=labels.astype(dtype))
    expected = sklearn.metrics.top_k_accuracy_score(labels, logits, k=2, labels=np.arange(6))
    np.testing.assert_allclose(metric.compute(), expected, rtol=1e-6)


def test_top_k_refuses_bad_numbers():
    with pytest.raises(ValueError, match="k >= 1, got 0"):
        TopKAccuracy.with_k(0)
    with pytest.raises(ValueError, match=r"needs at least 5 classes, the logits have 3.*with_k\(3\)"):
        TopKAccuracy.from_model_output(logits=jnp.ones((2, 3)), labels=jnp.zeros(2, jnp.int32))


@pytest.mark.parametrize("metric", [TopKAccuracy.with_k(2), ConfusionMatrix.of(3)])
def test_classification_metrics_refuse_other_labels(metric):
    with pytest.raises(TypeError, match=r"integer dtype, got float32\[2\].*astype\(jnp.int32\)"):
        metric.from_model_output(logits=jnp.ones((2, 3)), labels=jnp.zeros(2))
    with pytest.raises(ValueError, match=r"labels \[2, 3\] and logits \[2, 3\].*argmax"):
        metric.from_model_output(logits=jnp.ones((2, 3)), labels=jnp.zeros((2, 3), jnp.int32))


def test_perplexity_weighs_tokens_not_sequences():
    draw = np.random.default_rng(0)
    losses = draw.gamma(2.0, size=(6, 9)).astype(np.float32)
    tokens = np.arange(9)[None] < draw.integers(1, 10, size=6)[:, None]
    mask = np.array([True, True, False, True, True, False])
    losses[2] = np.nan
    metric = Perplexity.from_outputs("nll", "is_token").from_model_output(
        nll=losses, is_token=tokens, mask=mask
    )
    counted = losses[tokens & mask[:, None]].astype(np.float64)
    np.testing.assert_allclose(metric.compute(), np.exp(counted.mean()), rtol=1e-5)
    assert int(metric.count) == len(counted)


def test_perplexity_of_named_outputs_keeps_its_own_names():
    assert (Perplexity.losses, Perplexity.token_mask) == ("loss", None)
    assert Perplexity.from_outputs("nll").losses == "nll"


def test_confusion_matrix_equals_scikit_learn():
    logits, labels = classification()
    metric = ConfusionMatrix.of(6).from_model_output(logits=jnp.asarray(logits), labels=jnp.asarray(labels))
    assert metric.compute().dtype == jnp.int32
    np.testing.assert_array_equal(
        metric.compute(), sklearn.metrics.confusion_matrix(labels, logits.argmax(-1))
    )


def test_confusion_matrix_leaves_out_labels_outside_of_the_classes():
    labels = jnp.array([-1, 0, 3, 2, 4])
    metric = ConfusionMatrix.of(3).from_model_output(logits=jnp.eye(5, 3), labels=labels)
    np.testing.assert_array_equal(metric.compute(), [[0, 1, 0], [0, 0, 0], [1, 0, 0]])


@pytest.mark.parametrize(
    ("metric", "reference"),
    [
        (Precision, sklearn.metrics.precision_score),
        (Recall, sklearn.metrics.recall_score),
        (F1, sklearn.metrics.f1_score),
    ],
)
@pytest.mark.parametrize("present", [6, 3])
def test_macro_scores_equal_scikit_learn(metric, reference, present):
    logits, labels = classification(rows=60)
    logits[:, present + 1 :] -= 100
    labels %= present
    value = metric.of(6).from_model_output(logits=jnp.asarray(logits), labels=jnp.asarray(labels)).compute()
    expected = reference(labels, logits.argmax(-1), average="macro", zero_division=0)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_confusion_matrix_must_know_its_classes():
    with pytest.raises(ValueError, match=r"Recall\.of takes at least 2 classes, got 1"):
        Recall.of(1)
    with pytest.raises(TypeError, match=r"use ConfusionMatrix\.of\(num_classes\)"):
        ConfusionMatrix.empty()
    with pytest.raises(ValueError, match=r"ConfusionMatrix\.of\(3\) got logits of 4 classes.*of\(4\)"):
        ConfusionMatrix.of(3).from_model_output(logits=jnp.ones((2, 4)), labels=jnp.zeros(2, jnp.int32))


@pytest.mark.parametrize("size", [20, 7, 1])
def test_weighted_metrics_are_those_of_numpy_and_scikit_learn(size):
    draw = np.random.default_rng(0)
    logits, labels = draw.normal(size=(20, 3, 5)).astype(np.float32), draw.integers(5, size=(20, 3))
    weights = draw.integers(3, size=(20, 3)).astype(np.float32)
    values, mask = np.where(weights, logits[..., 0], np.nan), np.arange(20) < 17
    mean, accuracy = Mean.from_output("values", weights="w"), Accuracy.with_weights("w")
    found = mean.empty(), accuracy.empty()
    for start in range(0, 20, size):
        rows = slice(start, start + size)
        batch = {"logits": logits[rows], "labels": labels[rows].astype(np.int32), "w": weights[rows]}
        given = {**batch, "values": values[rows], "mask": mask[rows]}
        found = [one.merge(type(one).from_model_output(**given)) for one in found]
    kept = weights[mask].reshape(-1)
    np.testing.assert_allclose(
        found[0].compute(), np.average(logits[mask][..., 0].reshape(-1), weights=kept), rtol=1e-5
    )
    expected = sklearn.metrics.accuracy_score(
        labels[mask].reshape(-1), logits.argmax(-1)[mask].reshape(-1), sample_weight=kept
    )
    np.testing.assert_allclose(found[1].compute(), expected, rtol=1e-6)


def test_the_mean_of_a_scalar_output_counts_real_rows():
    mean = Mean.from_output("temperature")
    full = mean.from_model_output(temperature=jnp.float32(1), mask=jnp.ones(4, bool))
    padded = mean.from_model_output(temperature=jnp.float32(4), mask=jnp.arange(4) < 2)
    np.testing.assert_allclose(full.merge(padded).compute(), (4 * 1 + 2 * 4) / 6, rtol=1e-6)


def test_weights_of_another_shape_are_refused_with_the_cure():
    mean = Mean.from_output("losses", weights="weight")
    with pytest.raises(ValueError, match=r"\[4\] and the values \[4, 2\].*output of their own"):
        mean.from_model_output(losses=jnp.ones((4, 2)), weight=jnp.ones(4))


def test_means_is_a_collection_of_the_loss_and_of_outputs():
    accumulator = Accumulator(means("kl", "length", weights="w"))
    outputs = {
        "loss": jnp.array([1.0, 3.0]),
        "kl": jnp.array([1.0, 5.0]),
        "length": jnp.array([2, 4]),
        "w": jnp.array([3.0, 1.0]),
        "mask": jnp.array([True, True]),
    }
    accumulator.specify(**outputs)
    found = accumulator.compute(accumulator.merge([accumulator.update(accumulator.empty(), **outputs)]))
    assert found == {"loss": 2.0, "kl": 2.0, "length": 2.5}
    assert accumulator.direction("loss") == "min"
    with pytest.raises(ValueError, match="'kl' twice"):
        means("kl", "kl")
