"""Batches that are one unit: a graph classifier on padded graphs, against the same written by hand."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clu import metrics
from flax import linen as nn

import trainkit as tk
from tests.helpers.compare import assert_same

CLASSES = 3


class Graphs(NamedTuple):
    """Several graphs in one, laid out as Jraph does; None where there is nothing."""

    nodes: Any
    edges: Any
    senders: Any
    receivers: Any
    n_node: Any
    n_edge: Any
    globals: Any


class Convolution(nn.Module):
    """Messages along the edges, pooled by graph."""

    @nn.compact
    def __call__(self, graphs):
        nodes = nn.Dense(8)(graphs.nodes)
        heard = jax.ops.segment_sum(nodes[graphs.senders], graphs.receivers, len(nodes))
        nodes = nn.relu(nodes + heard)
        count = len(graphs.n_node)
        owner = jnp.repeat(jnp.arange(count), graphs.n_node, total_repeat_length=len(nodes))
        return nn.Dense(CLASSES)(jax.ops.segment_sum(nodes, owner, count))


def pad_with_graphs(sizes, draw, nodes=24, edges=40):
    """Graphs of these sizes, and one that pads them, as `jraph.pad_with_graphs` makes it."""
    n_node, n_edge = np.asarray([*sizes, 0]), np.asarray([2 * size for size in sizes] + [0])
    starts = np.cumsum([0, *sizes])
    ends = [
        start + draw.integers(size, size=(2, 2 * size)) for start, size in zip(starts, sizes, strict=False)
    ]
    n_node[-1], n_edge[-1] = nodes - n_node.sum(), edges - n_edge.sum()
    ends = np.concatenate([*ends, np.full((2, n_edge[-1]), nodes - 1)], axis=1)
    features = draw.normal(size=(nodes, 4))
    features[sum(sizes) :] = 0
    return Graphs(
        nodes=features.astype(np.float32),
        edges=None,
        senders=ends[0].astype(np.int32),
        receivers=ends[1].astype(np.int32),
        n_node=n_node.astype(np.int32),
        n_edge=n_edge.astype(np.int32),
        globals=None,
    )


def units(count, seed=0):
    """Batches of three graphs or two, with a graph that pads; the leading sizes of the leaves are all different."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        sizes = draw.integers(2, 5, size=draw.integers(1, 4))
        graphs = pad_with_graphs(sizes, draw)
        graphs = graphs._replace(n_node=np.pad(graphs.n_node, (0, 4 - len(graphs.n_node))))
        labels = np.pad(draw.integers(CLASSES, size=len(sizes)), (0, 4 - len(sizes)))
        real = np.arange(4) < len(sizes)
        found.append({"graphs": graphs, "labels": labels.astype(np.int32), "real": real})
    return found


class GraphTrainer(tk.Trainer):
    batch_axis = None
    metrics = metrics.Collection.create(
        loss=metrics.Average.from_output("loss"), accuracy=tk.metrics.Accuracy.with_weights("real")
    )

    def loss(self, model, batch, ctx):
        logits = model(batch["graphs"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return tk.Weighted(losses, batch["real"]), {**batch, "logits": logits}

    def predict_step(self, model, batch, ctx):
        return {"logits": model(batch["graphs"])}


def quotient(params, batches):
    """The mean loss over all real graphs of some batches."""
    total = count = 0.0
    for batch in batches:
        logits = Convolution().apply({"params": params}, batch["graphs"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        total, count = total + (losses * batch["real"]).sum(), count + batch["real"].sum()
    return total / count


def by_hand(params, tx, steps):
    state, step = tx.init(params), jax.jit(jax.grad(quotient))
    for batches in steps:
        updates, state = tx.update(step(params, batches), state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_graph_classifier_trains_and_evaluates_as_by_hand(accumulate):
    data, tx = units(4), optax.adam(1e-2)
    trainer = GraphTrainer(Convolution(), tx, accumulate=accumulate)
    start = trainer.init(data[0]).params
    result = trainer.fit(data, epochs=2, eval_data=data)
    steps = [data[i : i + accumulate] for i in range(0, 4, accumulate)] * 2
    params = by_hand(start, tx, steps)
    assert result.step == len(steps)
    assert_same(result.state.params, params, rtol=1e-4, atol=1e-5)
    logits = [np.asarray(Convolution().apply({"params": params}, batch["graphs"])) for batch in data]
    hits = np.concatenate(
        [(one.argmax(-1) == b["labels"])[b["real"]] for one, b in zip(logits, data, strict=True)]
    )
    assert result.history.last("eval/accuracy") == pytest.approx(hits.mean())
    assert result.history.last("eval/loss") == pytest.approx(float(quotient(params, data)), rel=1e-4)


def test_predictions_are_a_list_of_units():
    data = units(3)
    trainer = GraphTrainer(Convolution(), optax.sgd(0.1))
    params = trainer.init(data[0]).params
    found = trainer.predict(iter(data))
    assert isinstance(found, list)
    for one, batch in zip(found, data, strict=True):
        expected = Convolution().apply({"params": params}, batch["graphs"])
        np.testing.assert_allclose(one["logits"], expected, rtol=1e-5, atol=1e-6)


class MeanTrainer(GraphTrainer):
    """A scalar loss: that of the unit."""

    metrics = tk.metrics.LossMetrics

    def loss(self, model, batch, ctx):
        assert ctx.mask.shape == (1,)
        weighted, _ = super().loss(model, batch, ctx)
        return (weighted.losses * weighted.weights).sum(), {}


def test_scalar_losses_are_averaged_over_units():
    data = units(5)
    trainer = MeanTrainer(Convolution(), optax.sgd(0.1), accumulate=2)
    params = trainer.init(data[0]).params
    each = [float(quotient(params, [batch]) * batch["real"].sum()) for batch in data]
    assert trainer.evaluate(data)["loss"] == pytest.approx(np.mean(each), rel=1e-5)
    assert trainer.fit(data[:2], epochs=1).history.last("train/loss") == pytest.approx(
        np.mean(each[:2]), rel=1e-5
    )


def test_an_own_step_takes_units():
    class Own(GraphTrainer):
        metrics = tk.metrics.LossMetrics

        def train_step(self, state, batch):
            loss, grads = jax.value_and_grad(quotient)(state.params, [batch])
            return state.apply_gradients(grads=grads), {"loss": loss}

        def eval_step(self, state, batch):
            return {"loss": quotient(state.params, [batch])}

    data = units(3)
    trainer = Own(Convolution(), optax.sgd(0.1))
    start = trainer.init(data[0]).params
    result = trainer.fit(data, epochs=1, eval_data=data)
    params = by_hand(start, optax.sgd(0.1), [[batch] for batch in data])
    assert_same(result.state.params, params, rtol=1e-5, atol=1e-6)
    expected = np.mean([float(quotient(params, [batch])) for batch in data])
    assert result.history.last("eval/loss") == pytest.approx(expected, rel=1e-5)


def test_a_step_of_a_unit_can_be_run_again(tmp_path):
    data = units(2)
    trainer = GraphTrainer(
        Convolution(),
        optax.sgd(0.1),
        callbacks=[tk.callbacks.Checkpoint(every=tk.Every(steps=1))],
        logdir=tmp_path,
    )
    trainer.fit(data, epochs=1)
    assert trainer.replay(2, data=data).finite


def test_errors_name_the_attribute():
    class Rows(GraphTrainer):
        batch_axis = 0

    with pytest.raises(ValueError, match="batch_axis = None on the trainer"):
        Rows(Convolution(), optax.sgd(0.1)).fit(units(2), epochs=1)
    with pytest.raises(ValueError, match="batch_axis = None on the trainer"):
        Rows(Convolution(), optax.sgd(0.1)).init(units(1)[0])

    class Losses(GraphTrainer):
        def loss(self, model, batch, ctx):
            weighted, _ = super().loss(model, batch, ctx)
            return weighted.losses, {}

    with pytest.raises(ValueError, match=r"shape \[4\] for a batch that is one unit.*tk.Weighted"):
        Losses(Convolution(), optax.sgd(0.1)).fit(units(2), epochs=1)


@pytest.mark.parametrize("strategy", ["vmap", "pmap"])
def test_strategies_that_divide_a_batch_are_refused(strategy):
    with pytest.raises(ValueError, match=r"divides a batch along its first dimension.*strategy='jit'"):
        GraphTrainer(Convolution(), optax.sgd(0.1), strategy=strategy)


def test_another_axis_is_refused():
    class Second(GraphTrainer):
        batch_axis = 1

    with pytest.raises(ValueError, match=r"batch_axis=1: must be 0.*or None"):
        Second(Convolution(), optax.sgd(0.1))
