"""Mistakes in a collection: each has its message, before anything is compiled."""

import clu.metrics
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainkit.metrics import ROCAUC, Accumulator, ConfusionMatrix, LossMetrics, TopKAccuracy

LOSS = {"loss": jax.ShapeDtypeStruct((8,), jnp.float32), "mask": jax.ShapeDtypeStruct((8,), jnp.bool_)}
LOGITS = jax.ShapeDtypeStruct((8, 10), jnp.float32)


def labels_of(dtype, shape=(8,)):
    return jax.ShapeDtypeStruct(shape, dtype)


def specify(metric, **outputs):
    accumulator = Accumulator(clu.metrics.Collection.create(metric=metric))
    accumulator.specify(**LOSS, **outputs)
    return accumulator


@pytest.mark.parametrize("wrong", [LossMetrics.empty(), clu.metrics.Average, "loss", None])
def test_a_collection_is_a_class(wrong):
    with pytest.raises(TypeError, match=r"must be a subclass of clu.metrics.Collection, the class and not"):
        Accumulator(wrong)


def test_a_collection_is_a_dataclass():
    class Bare(clu.metrics.Collection):
        loss: clu.metrics.Average.from_output("loss")

    with pytest.raises(TypeError, match=r"Bare is not a dataclass. Decorate it with @flax.struct.dataclass"):
        Accumulator(Bare)


def test_annotations_are_classes():
    @flax.struct.dataclass
    class Postponed(clu.metrics.Collection):
        loss: "clu.metrics.Average"

    with pytest.raises(TypeError, match=r"'loss' of Postponed.*Remove `from __future__ import annotations`"):
        Accumulator(Postponed)
    with pytest.raises(
        TypeError, match=r"'loss' of .* must be a subclass of clu.metrics.Metric, got .*float"
    ):
        Accumulator(clu.metrics.Collection.create(loss=float))


def test_a_metric_needs_empty():
    @flax.struct.dataclass
    class Largest(clu.metrics.Metric):
        value: jax.Array

    with pytest.raises(TypeError, match=r"'peak' \(Largest\) of .* has no empty\(\). Give it a classmethod"):
        Accumulator(clu.metrics.Collection.create(peak=Largest))


def test_clus_own_std_is_refused_where_it_cannot_compute():
    with pytest.raises(TypeError, match=r"'spread'.* is clu.metrics.Std.*Use trainkit.metrics.Std"):
        Accumulator(clu.metrics.Collection.create(spread=clu.metrics.Std.from_output("loss")))


@pytest.mark.parametrize(
    ("metric", "missing"),
    [
        (clu.metrics.Average.from_output("nll"), "'nll'"),
        (clu.metrics.Average.from_fun(lambda nll, **_: nll), "'nll'"),
        (clu.metrics.Accuracy, "'logits' and 'labels'"),
        (TopKAccuracy, "'logits' and 'labels'"),
        (ConfusionMatrix.of(3), "'logits' and 'labels'"),
        (ROCAUC, "'labels'"),
        (clu.metrics.CollectingMetric.from_outputs(("nll",)), "'nll'"),
    ],
)
def test_a_missing_output_is_named_beside_those_there_are(metric, missing):
    there = r"There are: loss float32\[8\], mask bool\[8\]\. Return it beside the losses"
    with pytest.raises(ValueError, match=rf"'metric' \(\w+\) asks for the output {missing}, which.*{there}"):
        specify(metric)


def test_a_bare_average_is_told_how_to_name_its_output():
    with pytest.raises(ValueError, match=r"output 'values'.*Name the output.*Average.from_output\('loss'\)"):
        specify(clu.metrics.Average)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.uint8])
def test_accuracy_is_told_of_its_labels_dtype(dtype):
    with pytest.raises(
        TypeError, match=rf"labels of dtype int32, got {jnp.dtype(dtype)}\[8\].*astype\(jnp.int32\)"
    ):
        specify(clu.metrics.Accuracy, logits=LOGITS, labels=labels_of(dtype))


def test_top_k_is_told_of_float_labels():
    with pytest.raises(
        TypeError, match=r"'metric' \(TopKAccuracy\) refused.*float32\[8\].*astype\(jnp.int32\)"
    ):
        specify(TopKAccuracy, logits=LOGITS, labels=labels_of(jnp.float32))


def test_another_mistake_is_passed_on_with_the_outputs():
    with pytest.raises(
        ValueError, match=r"'metric' \(Accuracy\) refused the outputs .*labels int32\[8, 10\].*ndim"
    ):
        specify(clu.metrics.Accuracy, logits=LOGITS, labels=labels_of(jnp.int32, (8, 10)))


def test_a_mask_that_would_be_ignored_is_refused():
    with pytest.raises(
        ValueError, match=r"takes the output 'nll', float32\[3, 8\], but the mask is bool\[8\]"
    ):
        specify(clu.metrics.Average.from_output("nll"), nll=jax.ShapeDtypeStruct((3, 8), jnp.float32))
    specify(clu.metrics.Average.from_output("nll"), nll=jax.ShapeDtypeStruct((), jnp.float32))
    specify(clu.metrics.Average.from_output("nll"), nll=jax.ShapeDtypeStruct((8, 3), jnp.float32))


@flax.struct.dataclass
class Growing(clu.metrics.Metric):
    rows: jax.Array

    @classmethod
    def empty(cls):
        return cls(rows=jnp.zeros((0,)))

    @classmethod
    def from_model_output(cls, *, loss, **_):
        return cls(rows=loss)

    def merge(self, other):
        return type(self)(rows=jnp.concatenate([self.rows, other.rows]))


@flax.struct.dataclass
class Reshaping(clu.metrics.Metric):
    state: dict

    @classmethod
    def empty(cls):
        return cls(state={})

    @classmethod
    def from_model_output(cls, *, loss, **_):
        return cls(state={"loss": loss})


@flax.struct.dataclass
class Batchwise(clu.metrics.Metric):
    total: jax.Array

    @classmethod
    def empty(cls):
        return cls(total=jnp.zeros(()))

    @classmethod
    def from_model_output(cls, *, loss, **_):
        return cls(total=loss)

    def merge(self, other):
        return type(self)(total=self.total + other.total)


def test_a_state_that_grows_is_refused():
    with pytest.raises(
        ValueError, match=r"metric/rows: float32\[8\] -> float32\[16\].*trainkit.metrics.collecting"
    ):
        specify(Growing)


def test_a_state_of_another_structure_is_refused():
    with pytest.raises(ValueError, match=r"same structure when empty and when made from a batch"):
        specify(Reshaping)


def test_specify_again_may_change_the_batch_but_not_what_is_carried():
    accumulator = specify(clu.metrics.Average.from_output("loss"))
    accumulator.specify(loss=np.ones(3, np.float32), mask=np.ones(3, bool))
    accumulator = specify(Batchwise)
    with pytest.raises(
        ValueError, match=r"metric/total: float32\[8\] -> float32\[3\].*doesn't depend on the batch"
    ):
        accumulator.specify(loss=np.ones(3, np.float32), mask=np.ones(3, bool))


@pytest.mark.parametrize("call", ["empty", "update", "merge"])
def test_specify_comes_first(call):
    accumulator = Accumulator(LossMetrics)
    arguments = {"empty": (), "update": ((),), "merge": ([],)}[call]
    with pytest.raises(RuntimeError, match=r"Call specify\(\*\*outputs\) first"):
        getattr(accumulator, call)(*arguments)


def test_packed_metrics_of_another_collection_are_refused():
    accumulator = specify(clu.metrics.Average.from_output("loss"))
    with pytest.raises(ValueError, match=r"vector of 3 words.*shapes \[\(5,\)\].*another collection"):
        accumulator.merge([(np.zeros(5, np.uint32),)])
