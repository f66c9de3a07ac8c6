"""Leaves that no step can take stay on the host; integers that lose bits and untrainable parameters are named."""

import clu.metrics
import flax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import trainkit as tk
from tests.helpers.weight import Weight, WeightTrainer, weight

NAMES = [np.array(["a", "b", "c", "d"]), np.array(["e", "f", "g", "h"])]


class Named(WeightTrainer):
    """Takes the numbers of a batch, and sees to it that the step is given nothing else."""

    def loss(self, model, batch, ctx):
        assert set(batch) == {"x", "more"}
        assert batch["more"] == (None,)
        return super().loss(model, batch["x"], ctx)

    def predict_step(self, model, batch, ctx):
        return {"x": batch["x"] + model()}


def batches():
    rows = [np.full(4, 1, np.float32), np.full(4, 2, np.float32)]
    for x, names in zip(rows, NAMES, strict=True):
        yield {"x": x, "id": names, "file": names.tolist(), "more": (names.astype(object),), "split": "train"}


def test_strings_and_objects_stay_on_the_host_and_are_named_once(caplog):
    made = Named(Weight(), optax.sgd(1.0))
    result = made.fit(batches, epochs=2, eval_data=batches)
    assert weight(result.state) == -6
    assert result.history.last("eval/loss") == 1.5
    said = [record.getMessage() for record in caplog.records if "stays on the host" in record.getMessage()]
    assert sorted(line.split("`")[1] for line in said) == ["file", "id", "more/0", "split"]


@pytest.mark.parametrize("kind", ["Arrays", "held", "list"])
def test_arrays_and_lists_may_hold_them(kind):
    whole = {name: np.concatenate([batch[name] for batch in batches()]) for name in ("x", "id")}
    data = {
        "Arrays": lambda: tk.data.Arrays(whole, 4, shuffle=True),
        "held": lambda: tk.data.Arrays(whole, 4, on_device=True),
        "list": lambda: [{"x": batch["x"], "id": batch["id"]} for batch in batches()],
    }[kind]()

    class Lone(WeightTrainer):
        def loss(self, model, batch, ctx):
            assert set(batch) == {"x"}
            return super().loss(model, batch["x"], ctx)

        def predict_step(self, model, batch, ctx):
            return {"x": batch["x"] + 0 * model()}

    made = Lone(Weight(), optax.sgd(1.0))
    assert weight(made.fit(data, epochs=1, eval_data=data).state) == -3
    predicted = made.predict(data)
    np.testing.assert_array_equal(predicted["id"], whole["id"])
    np.testing.assert_array_equal(predicted["x"], whole["x"])


def test_a_batch_of_nothing_else_is_refused_by_name():
    with pytest.raises(TypeError, match="Leaf `id`"):
        Named(Weight(), optax.sgd(1.0)).fit(lambda: iter([{"id": NAMES[0]}]), epochs=1)


def test_they_come_back_beside_what_predict_gives():
    made = Named(Weight(), optax.sgd(1.0))
    made.init(next(batches()))
    predicted = made.predict(batches)
    np.testing.assert_array_equal(predicted["id"], np.concatenate(NAMES))
    np.testing.assert_array_equal(predicted["file"], np.concatenate(NAMES))
    np.testing.assert_array_equal(predicted["x"], [1, 1, 1, 1, 2, 2, 2, 2])
    assert "split" not in predicted


@pytest.mark.parametrize("arrays", [True, False], ids=["Arrays", "iterable"])
@pytest.mark.parametrize(("value", "warns"), [(2**31, True), (2**31 - 1, False), (-(2**31) - 1, True)])
def test_integers_that_lose_bits_are_named_once(caplog, arrays, value, warns):
    class Ids(WeightTrainer):
        def loss(self, model, batch, ctx):
            return super().loss(model, batch["x"], ctx)

    data = {"x": np.ones(8, np.float32), "id": np.array([1, 2, 3, 4, 5, 6, 7, value])}
    halves = [{name: leaf[part] for name, leaf in data.items()} for part in (slice(4), slice(4, 8))]
    source = tk.data.Arrays(data, 4) if arrays else lambda: iter(halves)
    Ids(Weight(), optax.sgd(1.0)).fit(source, epochs=2)
    said = [
        record.getMessage()
        for record in caplog.records
        if "integers that int32 does not" in record.getMessage()
    ]
    assert len(said) == warns
    assert all("`id`" in line for line in said)


def test_a_parameter_without_a_gradient_is_named():
    class Table(nn.Module):
        @nn.compact
        def __call__(self, x):
            table = self.param("table", lambda key: jnp.arange(4))
            return nn.Dense(1)(x)[:, 0] + table[0]

    class Fits(tk.Trainer):
        def loss(self, model, batch, ctx):
            return model(batch) ** 2, {}

    with pytest.raises(TypeError, match=r"have no gradient: params/table int32\[4\]"):
        Fits(Table(), optax.sgd(0.1)).fit([np.ones((4, 2), np.float32)], epochs=1)


def worst(rows):
    """The name of the row of the largest loss, as its place in the alphabet; all names of the rows that count."""
    return {"worst": ord(rows["id"][rows["loss"].argmax()]) - ord("a"), "seen": len(set(rows["id"]))}


@pytest.mark.parametrize("batch_size", [4, 3, 8])
def test_metrics_that_collect_rows_get_them_beside_the_outputs(batch_size):
    @flax.struct.dataclass
    class Metrics(clu.metrics.Collection):
        loss: clu.metrics.Average.from_output("loss")
        rows: tk.metrics.collecting(["loss", "id"], worst)
        names: tk.metrics.collecting(["id"], lambda rows: len(rows["id"]))

    class Collects(WeightTrainer):
        metrics = Metrics

        def loss(self, model, batch, ctx):
            return super().loss(model, batch["x"], ctx)

    losses = np.array([3, 1, 4, 1, 5, 9, 2, 6], np.float32)
    data = tk.data.Arrays({"x": losses, "id": np.array(list("abcdefgh"))}, batch_size)
    result = Collects(Weight(), optax.sgd(1.0)).fit(data, epochs=1, eval_data=data)
    last = {
        name: result.history.last(f"eval/{name}") for name in ("loss", "rows/worst", "rows/seen", "names")
    }
    assert last == {"loss": losses.mean(), "rows/worst": losses.argmax(), "rows/seen": 8, "names": 8}


def test_a_metric_that_collects_what_is_nowhere_is_refused():
    @flax.struct.dataclass
    class Metrics(clu.metrics.Collection):
        rows: tk.metrics.collecting(["id", "nowhere"], worst)

    class Collects(WeightTrainer):
        metrics = Metrics

        def loss(self, model, batch, ctx):
            return super().loss(model, batch["x"], ctx)

    data = [{"x": np.ones(4, np.float32), "id": NAMES[0]}]
    with pytest.raises(ValueError, match="'nowhere'"):
        Collects(Weight(), optax.sgd(1.0)).fit(data, epochs=1)
