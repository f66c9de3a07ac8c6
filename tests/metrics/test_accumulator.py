"""The accumulator's sums against NumPy in float64."""

import logging

import clu.metrics
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sklearn.metrics

from trainkit.metrics import (
    ROCAUC,
    Accumulator,
    ConfusionMatrix,
    LossMetrics,
    Std,
    collecting,
)


@flax.struct.dataclass
class Everything(clu.metrics.Collection):
    accuracy: clu.metrics.Accuracy
    auc: ROCAUC
    loss: clu.metrics.Average.from_output("loss")
    spread: Std.from_output("loss")
    norm: clu.metrics.LastValue.from_output("norm")
    pairs: ConfusionMatrix.of(2)
    kept: clu.metrics.CollectingMetric.from_outputs(("loss", "mask"))
    median: collecting(["loss"], lambda rows: np.median(rows["loss"]))


def batch_of(rows, seed, masked=0):
    draw = np.random.default_rng(seed)
    outputs = {
        "loss": draw.gamma(2.0, size=rows).astype(np.float32),
        "logits": draw.normal(size=(rows, 2)).astype(np.float32),
        "labels": draw.integers(2, size=rows).astype(np.int32),
        "norm": np.float32(seed),
        "mask": np.arange(rows) < rows - masked,
    }
    outputs["loss"][rows - masked :] = np.nan
    outputs["logits"][rows - masked :] = np.nan
    return outputs


def specified(collection, outputs):
    accumulator = Accumulator(collection)
    accumulator.specify(**jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), outputs))
    return accumulator


def real(batches, name):
    return np.concatenate([batch[name][batch["mask"]] for batch in batches])


def check_everything(values, batches, loss_rtol=1e-6):
    loss, logits, labels = (real(batches, name) for name in ("loss", "logits", "labels"))
    predictions = logits.argmax(-1)
    assert list(values) == [
        "accuracy",
        "auc",
        "loss",
        "spread",
        "norm",
        "pairs",
        "kept/loss",
        "kept/mask",
        "median",
    ]
    assert all(
        type(values[name]) is float for name in ("accuracy", "auc", "loss", "spread", "norm", "median")
    )
    np.testing.assert_allclose(
        values["accuracy"], sklearn.metrics.accuracy_score(labels, predictions), rtol=1e-12
    )
    np.testing.assert_allclose(
        values["auc"],
        sklearn.metrics.roc_auc_score(labels, logits[:, 1] - logits[:, 0].astype(np.float64)),
        rtol=1e-12,
    )
    np.testing.assert_allclose(values["loss"], loss.mean(dtype=np.float64), rtol=loss_rtol)
    np.testing.assert_allclose(values["spread"], loss.std(dtype=np.float64), rtol=loss_rtol)
    assert values["norm"] == batches[-1]["norm"]
    np.testing.assert_array_equal(values["pairs"], sklearn.metrics.confusion_matrix(labels, predictions))
    np.testing.assert_array_equal(values["kept/loss"], loss)
    assert values["median"] == np.median(loss)


@pytest.mark.parametrize("segment", [1, 3, 7])
def test_a_pass_with_masked_rows_equals_numpy(segment):
    batches = [batch_of(16, seed, masked=seed % 4) for seed in range(7)]
    accumulator = specified(Everything, batches[0])
    step = jax.jit(lambda packed, x: (accumulator.update(packed, **x), accumulator.collect(**x)))
    segments, collected = [], []
    for number, batch in enumerate(batches):
        if number % segment == 0:
            segments.append(accumulator.empty())
        segments[-1], rows = step(segments[-1], batch)
        collected.append(rows)
    check_everything(accumulator.compute(accumulator.merge(segments), collected), batches)


def test_rows_restricted_by_the_caller_give_the_same():
    batches = [batch_of(8, seed, masked=3) for seed in range(3)]
    accumulator = specified(Everything, batches[0])
    packed = accumulator.empty()
    for batch in batches:
        packed = accumulator.update(packed, **batch)
    collected = [accumulator.real_rows(accumulator.collect(**batch)) for batch in batches]
    assert {len(array) for rows in collected for array in rows.values()} == {5}
    assert all(isinstance(array, np.ndarray) for rows in collected for array in rows.values())
    check_everything(accumulator.compute(accumulator.merge([packed]), collected), batches)


@pytest.mark.parametrize("map_over", [jax.vmap, jax.pmap])
def test_update_over_a_mapped_axis_carries_the_whole_batch(map_over):
    shards = 4 if map_over is jax.vmap else jax.local_device_count()
    batch = batch_of(16, seed=1, masked=3)
    batch["norm"] = np.full(16, 2.5, np.float32)
    sharded = {name: value.reshape(shards, -1, *value.shape[1:]) for name, value in batch.items()}
    accumulator = specified(Everything, {name: value[0] for name, value in sharded.items()})
    packed = tuple(np.broadcast_to(part, (shards, *part.shape)) for part in accumulator.empty())
    step = map_over(lambda p, x: accumulator.update(p, axis_name="axis", **x), axis_name="axis")
    packed = [np.asarray(part) for part in step(packed, sharded)]
    for part in packed:
        np.testing.assert_array_equal(part, np.broadcast_to(part[:1], part.shape))
    merged = accumulator.merge([tuple(part[0] for part in packed)])
    check_everything(accumulator.compute(merged, [accumulator.collect(**batch)]), [batch | {"norm": 2.5}])


def test_update_compiles_once_and_carries_one_small_vector():
    batches = [batch_of(8, seed) for seed in range(3)]
    accumulator = specified(Everything, batches[0])
    traces = []

    @jax.jit
    def step(packed, outputs):
        traces.append(1)
        return accumulator.update(packed, **outputs)

    packed = accumulator.empty()
    assert all(isinstance(part, np.ndarray) for part in packed)
    for batch in batches:
        new = step(packed, batch)
        assert [(part.shape, part.dtype) for part in new] == [(part.shape, part.dtype) for part in packed]
        packed = new
    assert len(traces) == 1
    assert len(packed) == 1


def test_update_in_a_scan_with_donation_equals_numpy():
    batches = [batch_of(8, seed) for seed in range(4)]
    accumulator = specified(LossMetrics, batches[0])
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)

    def steps(packed, outputs):
        return jax.lax.scan(lambda c, x: (accumulator.update(c, **x), None), packed, outputs)[0]

    run = jax.jit(steps, donate_argnums=0)
    packed = run(accumulator.empty(), stacked)
    packed = run(packed, stacked)
    value = accumulator.compute(accumulator.merge([packed]))["loss"]
    np.testing.assert_allclose(value, real(batches, "loss").mean(dtype=np.float64), rtol=1e-6)


def test_empty_is_not_shared_between_calls():
    accumulator = specified(LossMetrics, batch_of(4, 0))
    accumulator.empty()[0][:] = 7
    assert np.isnan(accumulator.compute(accumulator.merge([accumulator.empty()]))["loss"])


def test_merge_is_exact_beyond_what_32_bits_hold():
    accumulator = specified(LossMetrics, {"loss": np.ones(1, np.float32)})
    rows = 10_000_000
    draw = np.random.default_rng(0)
    means = draw.random(300).astype(np.float32)
    # What 300 segments of ten million examples carry: 3e9 examples are more than an int32 counts.
    segments = []
    for mean in means:
        state = LossMetrics.empty()
        loss = state.loss.replace(total=jnp.float32(mean * rows), count=jnp.int32(rows))
        counter = state._reduction_counter.replace(value=jnp.int32(2))
        state = state.replace(loss=loss, _reduction_counter=counter)
        segments.append(accumulator._packing.pack(state))
    merged = accumulator.merge(segments)
    totals = np.float32(means * np.float32(rows)).astype(np.float64)
    assert merged.loss.count == 3_000_000_000
    assert merged.loss.total.dtype == np.float64
    assert accumulator.compute(merged)["loss"] == pytest.approx(totals.sum() / 3e9, rel=1e-15)


def test_merge_continues_from_an_earlier_one():
    batches = [batch_of(8, seed) for seed in range(3)]
    accumulator = specified(LossMetrics, batches[0])
    first, second, third = (accumulator.update(accumulator.empty(), **batch) for batch in batches)
    start = accumulator.merge([first, second])
    assert accumulator.merge([], start) is start
    value = accumulator.compute(accumulator.merge([third], start))["loss"]
    assert value == pytest.approx(real(batches, "loss").mean(dtype=np.float64), rel=1e-6)
    assert accumulator.compute(start) == accumulator.compute(accumulator.merge([first, second]))


def test_a_segment_without_updates_keeps_the_last_value():
    collection = clu.metrics.Collection.create(norm=clu.metrics.LastValue.from_output("norm"))
    accumulator = specified(collection, {"norm": np.float32(0)})
    packed = accumulator.update(accumulator.empty(), norm=np.float32(3))
    assert accumulator.compute(accumulator.merge([packed, accumulator.empty()])) == {"norm": 3.0}


def test_without_examples_every_value_is_quietly_nan():
    accumulator = specified(Everything, batch_of(4, 0))
    merged = accumulator.merge([])
    for collected in ([], [accumulator.collect(**batch_of(4, 0, masked=4))]):
        values = accumulator.compute(merged, collected)
        assert list(values) == list(accumulator.names)
        assert not values.pop("pairs").any()
        assert np.isnan(list(values.values())).all()


def test_without_collected_rows_only_device_metrics_are_computed():
    batch = batch_of(4, 0)
    accumulator = specified(Everything, batch)
    merged = accumulator.merge([accumulator.update(accumulator.empty(), **batch)])
    assert list(accumulator.compute(merged)) == ["accuracy", "loss", "spread", "norm", "pairs"]
    assert accumulator.has_collecting
    assert accumulator.names == ("accuracy", "auc", "loss", "spread", "norm", "pairs", "kept", "median")


def test_collect_is_empty_without_collecting_metrics():
    batch = batch_of(4, 0)
    accumulator = specified(LossMetrics, batch)
    assert accumulator.collect(**batch) == {}
    assert not accumulator.has_collecting


def test_collect_shares_outputs_between_metrics():
    collected = specified(Everything, batch_of(4, 0)).collect(**batch_of(4, 0))
    assert sorted(collected) == ["kept/loss", "kept/mask", "labels", "logits", "loss", "mask"]


def test_half_precision_losses_are_summed_in_float32():
    losses = np.random.default_rng(0).random(4096).astype(jnp.bfloat16)
    outputs = {"loss": losses, "mask": np.ones(4096, bool)}
    accumulator = specified(LossMetrics, outputs)
    value = accumulator.compute(accumulator.merge([accumulator.update(accumulator.empty(), **outputs)]))[
        "loss"
    ]
    assert value == pytest.approx(losses.astype(np.float64).mean(), rel=1e-6)


def test_scalar_outputs_weigh_the_same_for_every_batch_and_warn_of_nothing(caplog):
    collection = clu.metrics.Collection.create(norm=clu.metrics.Average.from_output("norm"))
    caplog.set_level(logging.WARNING)
    outputs = [{"norm": np.float32(n), "mask": np.ones(rows, bool)} for n, rows in ((1, 2), (4, 7))]
    accumulator = specified(collection, outputs[0])
    packed = accumulator.empty()
    for one in outputs:
        packed = accumulator.update(packed, **one)
    assert accumulator.compute(accumulator.merge([packed])) == {"norm": 2.5}
    assert not caplog.records


def test_python_numbers_among_the_outputs_are_taken():
    collection = clu.metrics.Collection.create(norm=clu.metrics.Average.from_output("norm"))
    accumulator = Accumulator(collection)
    accumulator.specify(norm=1.5)
    assert accumulator.compute(accumulator.merge([accumulator.update(accumulator.empty(), norm=1.5)])) == {
        "norm": 1.5
    }


def test_strict_dtypes_and_ranks_do_not_reach_into_clu(strict_dtypes):
    batch = batch_of(8, 1)
    accumulator = specified(Everything, batch)
    packed = jax.jit(lambda p, x: accumulator.update(p, **x))(accumulator.empty(), batch)
    check_everything(
        accumulator.compute(accumulator.merge([packed]), [accumulator.collect(**batch)]), [batch]
    )


@flax.struct.dataclass
class PerClass(clu.metrics.Metric):
    """Hit rate per class; `empty` is a scalar that merging broadcasts, and computing is jax.numpy."""

    hits: jax.Array
    seen: jax.Array

    @classmethod
    def empty(cls):
        return cls(hits=jnp.zeros(()), seen=jnp.zeros((), jnp.int32))

    @classmethod
    def from_model_output(cls, *, logits, labels, **_):
        classes = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.int32)
        hits = (logits.argmax(-1) == labels)[:, None] * classes
        return cls(hits=hits.sum(0).astype(jnp.float32), seen=classes.sum(0))

    def merge(self, other):
        return type(self)(hits=self.hits + other.hits, seen=self.seen + other.seen)

    def compute(self):
        return {"rate": jnp.divide(self.hits, self.seen), "worst": jnp.min(self.hits / self.seen)}


def test_a_metric_whose_empty_is_smaller_and_whose_values_are_several():
    batch = batch_of(32, 0)
    accumulator = specified(clu.metrics.Collection.create(per_class=PerClass), batch)
    packed = jax.jit(lambda p, x: accumulator.update(p, **x))(accumulator.empty(), batch)
    values = accumulator.compute(accumulator.merge([packed, packed]))
    expected = sklearn.metrics.recall_score(batch["labels"], batch["logits"].argmax(-1), average=None)
    assert values["per_class/rate"].dtype == np.float64
    np.testing.assert_allclose(values["per_class/rate"], expected, rtol=1e-12)
    assert values["per_class/worst"] == pytest.approx(expected.min(), rel=1e-12)


def test_inherited_metrics_and_an_overridden_compute_are_kept():
    @flax.struct.dataclass
    class More(LossMetrics):
        accuracy: clu.metrics.Accuracy

        def compute(self):
            values = super().compute()
            return values | {"error": 1 - values["accuracy"]}

    @flax.struct.dataclass
    class Derived(clu.metrics.Collection):
        loss: clu.metrics.Average.from_output("loss")

        def compute(self):
            return {"double": 2 * super().compute()["loss"]}

    batch = batch_of(8, 0)
    for collection, expected in ((More, ["loss", "accuracy", "error"]), (Derived, ["double"])):
        accumulator = specified(collection, batch)
        packed = accumulator.update(accumulator.empty(), **batch)
        assert list(accumulator.compute(accumulator.merge([packed]))) == expected


def test_large_leaves_travel_on_their_own():
    draw = np.random.default_rng(0)
    labels = draw.integers(40, size=64).astype(np.int32)
    outputs = {"logits": draw.normal(size=(64, 40)).astype(np.float32), "labels": labels}
    collection = clu.metrics.Collection.create(pairs=ConfusionMatrix.of(40), accuracy=clu.metrics.Accuracy)
    accumulator = specified(collection, outputs)
    packed = jax.jit(lambda p, x: accumulator.update(p, **x))(accumulator.empty(), outputs)
    assert [part.shape for part in packed] == [(3,), (40, 40)]
    values = accumulator.compute(accumulator.merge([packed]))
    expected = sklearn.metrics.confusion_matrix(labels, outputs["logits"].argmax(-1), labels=np.arange(40))
    np.testing.assert_array_equal(values["pairs"], expected)
    assert values["accuracy"] == pytest.approx(np.trace(expected) / 64)


def test_specify_works_inside_of_a_trace():
    batch = batch_of(8, 0)
    accumulator = Accumulator(LossMetrics)

    @jax.jit
    def step(outputs):
        accumulator.specify(**outputs)
        return accumulator.update(accumulator.empty(), **outputs)

    value = accumulator.compute(accumulator.merge([step(batch)]))["loss"]
    assert value == pytest.approx(batch["loss"].mean(dtype=np.float64), rel=1e-6)


def test_metrics_match_a_hand_written_loop_over_a_model():
    draw = np.random.default_rng(0)
    weights = draw.normal(size=(5, 2)).astype(np.float32)
    images, labels = draw.normal(size=(30, 5)).astype(np.float32), draw.integers(2, size=30).astype(np.int32)

    def outputs_of(x, y, mask):
        losses = optax.softmax_cross_entropy_with_integer_labels(x @ weights, y)
        return {"loss": losses, "mask": mask}

    accumulator = specified(LossMetrics, jax.eval_shape(outputs_of, images[:8], labels[:8], np.ones(8, bool)))
    packed = accumulator.empty()
    for start in range(0, 30, 8):
        x, y = images[start : start + 8], labels[start : start + 8]
        pad = 8 - len(x)
        x, y = np.pad(x, ((0, pad), (0, 0)), constant_values=np.nan), np.pad(y, (0, pad))
        packed = accumulator.update(packed, **outputs_of(x, y, np.arange(8) < 8 - pad))
    logits = (images @ weights).astype(np.float64)
    expected = sklearn.metrics.log_loss(labels, np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
    assert accumulator.compute(accumulator.merge([packed]))["loss"] == pytest.approx(expected, rel=1e-5)
