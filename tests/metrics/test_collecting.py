"""Metrics over all rows, against scikit-learn."""

import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from trainkit.metrics import ROCAUC, Collecting, collecting


def auc(**outputs):
    return ROCAUC.from_model_output(**{name: jnp.asarray(value) for name, value in outputs.items()}).compute()


@pytest.mark.parametrize("levels", [2, 7, 100_000])
@pytest.mark.parametrize("positives", [0.5, 0.03])
def test_roc_auc_equals_scikit_learn_with_and_without_ties(levels, positives):
    draw = np.random.default_rng(levels)
    labels = (draw.random(1000) < positives).astype(np.int32)
    scores = (draw.integers(levels, size=1000) / levels + 0.1 * labels).astype(np.float32)
    expected = sklearn.metrics.roc_auc_score(labels, scores)
    assert auc(labels=labels, scores=scores) == pytest.approx(expected, rel=1e-12)


def test_roc_auc_of_two_logits_ranks_by_the_softmax():
    draw = np.random.default_rng(0)
    logits = draw.normal(scale=3, size=(500, 2)).astype(np.float32)
    labels = (logits[:, 1] + draw.normal(scale=4, size=500) > 0).astype(np.int32)
    probability = 1 / (1 + np.exp(logits[:, 0].astype(np.float64) - logits[:, 1]))
    expected = sklearn.metrics.roc_auc_score(labels, probability)
    assert auc(labels=labels, logits=logits) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", [(40,), (40, 1)])
@pytest.mark.parametrize("name", ["scores", "logits"])
def test_roc_auc_of_one_number_per_row(shape, name):
    draw = np.random.default_rng(0)
    labels, scores = draw.integers(2, size=40), draw.normal(size=40).astype(np.float32)
    expected = sklearn.metrics.roc_auc_score(labels, scores)
    assert auc(labels=labels, **{name: scores.reshape(shape)}) == pytest.approx(expected, rel=1e-12)


def test_roc_auc_takes_bool_and_float_labels():
    scores = np.array([0.1, 0.4, 0.35, 0.8], np.float32)
    for labels in (np.array([False, False, True, True]), np.array([0.0, 0.0, 1.0, 1.0], np.float32)):
        assert auc(labels=labels, scores=scores) == 0.75


@pytest.mark.parametrize(
    ("labels", "scores"), [([1, 1], [0.1, 0.2]), ([0, 0], [0.1, 0.2]), ([0, 1], [0.1, float("nan")])]
)
def test_roc_auc_is_nan_where_it_is_not_defined(labels, scores):
    assert np.isnan(auc(labels=labels, scores=scores))


def test_roc_auc_refuses_what_is_not_binary():
    with pytest.raises(ValueError, match=r"labels 0 and 1, got \[0, 2\]"):
        auc(labels=[0, 2], scores=[0.1, 0.2])
    with pytest.raises(ValueError, match=r"'logits' must be .* got \[2, 3\] for 2 labels"):
        auc(labels=[0, 1], logits=np.ones((2, 3), np.float32))


def test_collecting_calls_the_function_once_with_the_real_rows():
    seen = []

    def spread(rows):
        seen.append(rows)
        return np.ptp(rows["x"], axis=0)

    metric = collecting(("x", "y"), spread)
    x = np.array([[1.0, 2.0], [np.nan, np.nan], [4.0, 9.0]], np.float32)
    first = metric.from_model_output(x=x, y=jnp.arange(3), z=jnp.ones(3), mask=jnp.array([True, False, True]))
    second = metric.from_model_output(x=x[:1] - 1, y=jnp.array([7]))
    np.testing.assert_array_equal(metric.empty().merge(first).merge(second).compute(), [4.0, 8.0])
    assert len(seen) == 1
    assert set(seen[0]) == {"x", "y"}
    np.testing.assert_array_equal(seen[0]["y"], [0, 2, 7])


def test_collecting_without_rows_is_nan_and_does_not_call_the_function():
    def fail(rows):
        raise AssertionError(rows)

    assert np.isnan(collecting(["x"], fail).empty().compute())


def test_collecting_refuses_bad_names_and_shapes():
    with pytest.raises(TypeError, match=r"got the string 'loss'. Use \['loss'\]"):
        collecting("loss", np.median)
    with pytest.raises(ValueError, match="at least one output"):
        collecting([], np.median)
    metric = collecting(["x"], np.median)
    with pytest.raises(ValueError, match=r"'x' with one row per example, got the shape \(\)"):
        metric.from_model_output(x=jnp.ones(()))
    with pytest.raises(ValueError, match=r"'x' with 3 rows, as the mask has, got the shape \(2,\)"):
        metric.from_model_output(x=jnp.ones(2), mask=jnp.ones(3, bool))


def test_a_subclass_must_say_what_it_computes():
    with pytest.raises(NotImplementedError, match="Collecting must implement from_rows"):
        Collecting.from_rows({})
