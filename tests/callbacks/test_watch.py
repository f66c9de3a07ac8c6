"""`Watch` against NumPy on a loop written by hand with Flax and optax."""

import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

import trainkit as tk
from tests.helpers.weight import Weight, WeightTrainer, numbers
from trainkit.callbacks import Watch
from trainkit.hooks._watch import BUCKETS

EACH, TX = tk.Every(steps=1), optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.05))


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, name="head")(nn.relu(nn.Dense(6, name="body")(x)))


class Regression(tk.Trainer):
    def loss(self, model, batch, ctx):
        return (model(batch["x"])[:, 0] - batch["y"]) ** 2, {}


def data(count=4, rows=8):
    rng = np.random.default_rng(0)
    return [
        {"x": rng.normal(size=(rows, 3)).astype(np.float32), "y": rng.normal(size=rows).astype(np.float32)}
        for _ in range(count)
    ]


def by_hand(batches):
    """Yields parameters before, gradients and updates of each step, as NumPy arrays."""
    init_rng, _ = jax.random.split(jax.random.key(0))
    params = Mlp().init(init_rng, batches[0]["x"])["params"]
    opt_state = TX.init(params)

    @jax.jit
    def grad(params, batch):
        return jax.grad(lambda p: ((Mlp().apply({"params": p}, batch["x"])[:, 0] - batch["y"]) ** 2).mean())(
            params
        )

    for batch in batches:
        grads = grad(params, batch)
        updates, opt_state = TX.update(grads, opt_state, params)
        yield jax.device_get((params, grads, updates))
        params = optax.apply_updates(params, updates)


def norm(*arrays):
    return np.sqrt(sum((np.asarray(array, np.float64) ** 2).sum() for array in arrays))


def expected_of(batches):
    found = {}
    for step, trees in enumerate(by_hand(batches), 1):
        whole = [norm(*jax.tree.leaves(tree)) for tree in trees]
        for what, tree, total in zip(("params", "grads", "updates"), trees, whole, strict=True):
            found[step, f"watch/{what}/norm"] = total
            for layer in ("body", "head"):
                found[step, f"watch/{what}/norm/{layer}"] = norm(tree[layer]["kernel"], tree[layer]["bias"])
        found[step, "watch/update_ratio"] = whole[2] / whole[0]
    return found


def watched(history):
    return {(step, name): v for name in history if name.startswith("watch") for step, v in history[name]}


def joined(batches):
    return {name: np.concatenate([one[name] for one in batches]) for name in batches[0]}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_norms(accumulate):
    batches = data(8 if accumulate == 2 else 4)
    steps = [joined(batches[i : i + accumulate]) for i in range(0, len(batches), accumulate)]
    trainer = Regression(Mlp(), TX, callbacks=[Watch(EACH)], accumulate=accumulate)
    found, expected = watched(trainer.fit(batches, epochs=1).history), expected_of(steps)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=2e-4, err_msg=str(key))


def test_what_is_asked_for_and_nothing_else():
    only = Watch(tk.At(steps=(2,)), "updates", by_layer=False)
    history = Regression(Mlp(), TX, callbacks=[only]).fit(data(), epochs=1).history
    expected = expected_of(data())
    names = ("watch/updates/norm", "watch/update_ratio")
    assert watched(history).keys() == {(2, name) for name in names}
    for name in names:
        np.testing.assert_allclose(history[name][0][1], expected[2, name], rtol=2e-4)


def test_histograms_as_tensorboard_reads_them(tmp_path):
    watch = Watch(tk.At(steps=(3,)), norms=False, histograms=True)
    Regression(Mlp(), TX, callbacks=[watch], logdir=tmp_path).fit(data(), epochs=1)
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    trees = dict(zip(("params", "grads", "updates"), list(by_hand(data()))[2], strict=True))
    expected = {
        f"watch/{what}/{layer}/{leaf}": trees[what][layer][leaf]
        for what in trees
        for layer in ("body", "head")
        for leaf in ("kernel", "bias")
    }
    assert set(events.Tags()["tensors"]) >= expected.keys()
    for name, array in expected.items():
        assert events.SummaryMetadata(name).plugin_data.plugin_name == "histograms"
        (event,) = events.Tensors(name)
        table = tensor_util.make_ndarray(event.tensor_proto)
        assert event.step == 3
        assert table.shape[1] == 3
        assert table[:, 2].sum() == array.size
        if array.size > 1:
            low, high = array.min(), array.max()
            np.testing.assert_allclose([table[0, 0], table[-1, 1]], [low, high], rtol=1e-3)
            counts, _ = np.histogram(array, BUCKETS, (low, high))
            # An element on an edge, to rounding, is in one bucket or the next.
            assert np.abs(np.cumsum(counts) - np.cumsum(table[:, 2])).max() <= 1


def test_a_histogram_leaves_out_what_is_not_finite_and_takes_the_whole_range():
    from trainkit.callbacks._watch import _tables
    from trainkit.hooks._watch import Histograms, _histogram

    arrays = {
        "mixed": [np.nan, np.inf, -np.inf, -1.0, 0.0, 1.0],
        "none": [np.nan, np.inf, np.inf, np.nan, np.nan, np.nan],
        "same": [2.0] * 6,
        "wide": [-3e38, 3e38, 1e37, 1e37, 1e37, 1e38],
        "tiny": [-3e-36, 3e-36, 1e-37, 1e-37, 1e-37, 1e-36],
    }
    parts = zip(*[_histogram(jnp.asarray(a, jnp.float32)) for a in arrays.values()], strict=True)
    tables = _tables(Histograms(*map(jnp.stack, parts), tuple(arrays)))
    assert tables.keys() == {"mixed", "same", "wide", "tiny"}
    assert tables["mixed"][:, 2].sum() == 3
    assert tables["mixed"][[0, -1], [0, 1]].tolist() == [-1, 1]
    assert tables["same"].tolist() == [[1.5, 2.5, 6]]
    for name in ("wide", "tiny"):
        counts, _ = np.histogram(np.asarray(arrays[name]), BUCKETS)
        assert tables[name][:, 2].tolist() == counts.tolist()


def test_a_skipped_update_is_none():
    batches = data()
    batches[1]["x"][0] = np.inf
    callbacks = [tk.callbacks.NanGuard("skip"), Watch(EACH, ("updates", "params"))]
    history = Regression(Mlp(), TX, callbacks=callbacks).fit(batches, epochs=1).history
    norms, ratios = dict(history["watch/updates/norm"]), dict(history["watch/update_ratio"])
    assert norms[2] == ratios[2] == 0
    assert norms[1] > 0
    assert norms[3] > 0
    params = dict(history["watch/params/norm"])
    assert params[2] == params[3] != params[1]


class Own(Regression):
    def train_step(self, state, batch):
        return super().train_step(state, batch)


def test_without_gradients(caplog):
    with caplog.at_level(logging.WARNING, "trainkit"):
        found = watched(Own(Mlp(), TX, callbacks=[Watch(EACH)]).fit(data(), epochs=1).history)
    assert caplog.text.count("Watch writes no gradients: this trainer has its own train_step") == 1
    expected = {key: value for key, value in expected_of(data()).items() if "grads" not in key[1]}
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(list(found.values()), [expected[key] for key in found], rtol=2e-4)
    with pytest.raises(ValueError, match="nothing to watch, because this trainer has its own train_step"):
        Own(Mlp(), TX, callbacks=[Watch(EACH, "grads")]).fit(data(), epochs=1)


def test_parameters_of_the_model_itself():
    watch = Watch(EACH, "params")
    history = WeightTrainer(Weight(), optax.sgd(1.0), callbacks=[watch]).fit(numbers(3, 1), epochs=1).history
    assert history["watch/params/norm"] == history["watch/params/norm/(root)"] == [(1, 0.0), (2, 3.0)]


def test_float16_gradients_are_without_the_loss_scale():
    watch = Watch(EACH, "grads", by_layer=False)
    half = Regression(Mlp(), TX, callbacks=[watch], precision="float16").fit(data(1), epochs=1).history
    np.testing.assert_allclose(
        half["watch/grads/norm"][0][1], expected_of(data(1))[1, "watch/grads/norm"], rtol=2e-2
    )


def test_arguments():
    with pytest.raises(ValueError, match=r"what=\('grad',\).*'params', 'grads', 'updates'"):
        Watch(what=("grad",))
    with pytest.raises(ValueError, match="one or more"):
        Watch(what=())
    with pytest.raises(ValueError, match="writes nothing"):
        Watch(norms=False)
    with pytest.raises(TypeError, match="every=50"):
        Watch(50)
