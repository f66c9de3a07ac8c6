"""Mistakes are refused with what was got, what is allowed and the cure, if possible before compiling."""

import contextlib
import functools
import os

import flax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clu import metrics
from flax import linen as nn

import trainkit as tk
from tests.helpers import weight
from tests.helpers.compare import assert_same
from tests.helpers.weight import Weight, WeightTrainer, numbers
from trainkit.callbacks import EMA, Callback, EarlyStopping

BATCH = {"x": np.ones((4, 2), np.float32), "y": np.zeros(4, np.float32)}
SGD = optax.sgd(0.1)


@contextlib.contextmanager
def refused(error, *parts, uncompiled=None):
    """Expects an error whose message has all `parts`, before `uncompiled`, a trainer, compiled a step."""
    with pytest.raises(error) as caught:
        yield
    message = caught.value.args[0] if isinstance(caught.value, KeyError) else str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    if uncompiled is not None:
        traces = uncompiled._engine.steps.traces
        assert [traces.count(step) for step in ("training", "evaluation", "prediction")] == [0, 0, 0]


class Line(tk.Trainer):
    """Returns what `returns` makes of the squared differences."""

    returns = staticmethod(lambda losses: (losses, {}))

    def loss(self, model, batch, ctx):
        return self.returns((model(batch["x"])[:, 0] - batch["y"]) ** 2)


def line(returns=None, *, cls=Line, **options):
    made = cls(nn.Dense(1), SGD, **options)
    if returns is not None:
        made.returns = returns
    return made


@functools.cache
def _start():
    return line().init(BATCH)


def started(**options):
    """A trainer with a state, which is made once."""
    made = line(**options)
    made.state = _start()
    return made


# The loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returns", "error", "parts"),
    [
        (lambda each: None, TypeError, ["loss returned NoneType", "(losses, outputs)", "return losses, {"]),
        (lambda each: each, TypeError, ["loss returned float32[4]", "(losses, outputs)", "return losses, {"]),
        (lambda each: (each, {}, {}), TypeError, ["loss returned a tuple of 3", "(losses, outputs)"]),
        (lambda each: (None, {}), TypeError, ["losses of type NoneType", "[batch]", "scalar"]),
        (lambda each: ({"a": each}, {}), TypeError, ["losses of type dict", "[batch]", "scalar"]),
        (lambda each: (each.astype(int), {}), TypeError, ["losses of dtype int32", "float", "astype"]),
        (lambda each: (each > 1, {}), TypeError, ["losses of dtype bool", "float", "astype"]),
        (
            lambda each: (each[:, None], {}),
            ValueError,
            ["losses of shape [4, 1]", "batch of 4", "[4]", "mean(axis=-1)"],
        ),
        (lambda each: (each[:3], {}), ValueError, ["losses of shape [3]", "batch of 4", "[4]"]),
        (lambda each: (each, each), TypeError, ["outputs of type float32[4]", "mapping of names to arrays"]),
        (lambda each: (each, None), TypeError, ["outputs of type NoneType", "mapping of names to arrays"]),
        (lambda each: (each, {"note": "high"}), TypeError, ["the output note of type str", "must be arrays"]),
        (lambda each: (each, {"loss": each}), ValueError, ["outputs named ['loss']", "Rename"]),
        (lambda each: (each, {"mask": each}), ValueError, ["outputs named ['mask']", "'token_mask'"]),
    ],
)
def test_a_loss_that_returns_the_wrong_thing(returns, error, parts):
    made = line(returns)
    with refused(error, *parts, uncompiled=made):
        made.fit([BATCH], epochs=1)


def test_no_loss():
    made = line(cls=tk.Trainer)
    with refused(
        NotImplementedError, "Trainer has no loss", "loss(self, model, batch, ctx)", uncompiled=made
    ):
        made.fit([BATCH], epochs=1)


def test_a_key_that_is_not_in_the_batch_is_the_users_own_error():
    made = line()
    with refused(KeyError, "y", uncompiled=made):
        made.fit([{"x": BATCH["x"]}], epochs=1)


# Metrics ----------------------------------------------------------------------------------------------------


@flax.struct.dataclass
class WithAccuracy(metrics.Collection):
    accuracy: metrics.Accuracy


class Accurate(tk.Trainer):
    metrics = WithAccuracy
    outputs = ("logits", "labels")

    def loss(self, model, batch, ctx):
        losses = (model(batch["x"])[:, 0] - batch["y"]) ** 2
        found = {"logits": model(batch["x"]), "labels": batch["y"]}
        return losses, {name: found[name] for name in self.outputs}


@pytest.mark.parametrize("ask", ["fit", "evaluate"])
def test_a_metric_that_asks_for_an_output_that_is_not_there(ask):
    made = started(cls=Accurate)
    made.outputs = ("logits",)
    parts = ["metric 'accuracy' (Accuracy)", "asks for the output 'labels'", "There are: ", "loss float32[4]"]
    with refused(ValueError, *parts, "return losses, {'labels': ...}", uncompiled=made):
        made.fit([BATCH], epochs=1) if ask == "fit" else made.evaluate([BATCH])


def test_accuracy_of_labels_that_are_floats():
    made = started(cls=Accurate)
    with refused(TypeError, "int32", "got float32[4]", ".astype(jnp.int32)", uncompiled=made):
        made.fit([BATCH], epochs=1)


@pytest.mark.parametrize("wrong", [{"loss": metrics.Average}, metrics.Average, WithAccuracy.empty, "loss"])
def test_metrics_that_are_no_collection(wrong):
    cls = type("Odd", (Line,), {"metrics": wrong})
    with refused(TypeError, "metrics=", "subclass of clu.metrics.Collection", "@flax.struct.dataclass"):
        line(cls=cls)


# The model and the optimizer --------------------------------------------------------------------------------


class Normed(nn.Module):
    axis_name: str | None

    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False, axis_name=self.axis_name)(x)


def test_a_layer_that_reduces_over_an_axis_of_another_name():
    made = Line(Normed("devices"), SGD)
    parts = ["axis named 'devices'", "does not bind", "Use axis_name='batch', or none"]
    with refused(ValueError, *parts, uncompiled=made):
        made.fit([BATCH], epochs=1)


def test_a_layer_that_reduces_over_the_batch_axis_needs_nothing():
    batch = {**BATCH, "x": np.arange(8, dtype=np.float32).reshape(4, 2) ** 2}
    named, plain = (Line(Normed(name), SGD).fit([batch], epochs=3) for name in ("batch", None))
    assert_same(named.state.variables, plain.state.variables)
    assert dict(named.history) == dict(plain.history)


def test_a_model_that_is_no_object_of_linen():
    with refused(TypeError, "model=Normed", "got the class", "Normed(...)"):
        Line(Normed, SGD)
    with refused(TypeError, "expected a flax.linen.Module", "got function"):
        Line(lambda x: x, SGD)


@pytest.mark.parametrize("tx", [optax.sgd, 0.1, None, "adam"])
def test_an_optimizer_that_is_not_optax(tx):
    with refused(TypeError, "tx=", "expected an optax transformation", "optax.adam(1e-3)"):
        line(cls=functools.partial(_with_tx, tx))


def _with_tx(tx, model, _):
    return Line(model, tx)


# Callbacks, strategies --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("callbacks", "error", "parts"),
    [
        ([EarlyStopping], TypeError, ["the class EarlyStopping", "pass an object, EarlyStopping(...)"]),
        ([print], TypeError, ["a builtin_function_or_method", "tk.callbacks.Lambda(on_step=...)"]),
        (Callback(), TypeError, ["expected a list", "callbacks=[Callback(...)]"]),
        (2 * [Callback()], ValueError, ["the same object twice", "give each once"]),
        ([EMA(0.9), EMA(0.99)], ValueError, ["state.hooks['ema']", "give one another name="]),
    ],
)
def test_callbacks(callbacks, error, parts):
    with refused(error, *parts):
        line(callbacks=callbacks)


def test_a_cadence_that_is_a_number():
    odd = Callback()
    odd.every = 50
    with refused(TypeError, "Callback.every=50", "tk.Every(steps=50)"):
        line(callbacks=[odd])
    with refused(TypeError, "eval_every=50", "tk.Every(steps=50)"):
        line().fit([BATCH], epochs=1, eval_data=[BATCH], eval_every=50)


@pytest.mark.parametrize("strategy", ["ddp", tk.parallel.Mesh, 8])
def test_an_unknown_strategy(strategy):
    with refused((TypeError, ValueError), "strategy=", "'jit'" if strategy != tk.parallel.Mesh else "Mesh()"):
        line(strategy=strategy)


def test_a_monitored_name_that_never_appears():
    made = line(callbacks=[EarlyStopping("eval/lost", mode="min")])
    with refused(ValueError, "'eval/lost'", "begin with one of: train/", "eval_data="):
        made.fit([BATCH], epochs=1)
    assert int(made.state.step) == 0
    made = weight.trainer(EarlyStopping("eval/lost", mode="min"))
    with refused(ValueError, "'eval/lost'", "the names are: eval/loss"):
        made.fit(numbers(1), epochs=5, eval_data=numbers(1))
    assert int(made.state.step) == 1


# Arguments of fit, evaluate, predict ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "parts"),
    [
        ({}, ["exactly one of epochs= and steps=", "got neither", "epochs=20"]),
        ({"epochs": 1, "steps": 1}, ["exactly one of epochs= and steps=", "got both"]),
        ({"epochs": 0}, ["epochs=0", "at least 1"]),
        ({"steps": 0}, ["steps=0", "at least 1"]),
        ({"steps": -3}, ["steps=-3", "at least 1"]),
        ({"epochs": 1.5}, ["epochs=1.5", "an int"]),
        ({"epochs": True}, ["epochs=True", "an int"]),
    ],
)
def test_the_length_of_a_fit(length, parts):
    made = line()
    with refused(ValueError, *parts, uncompiled=made):
        made.fit([BATCH], **length)


@pytest.mark.parametrize("name", ["train", "a/b", "", 3])
def test_names_of_evaluations(name):
    made = line()
    with refused(ValueError, f"the name {name!r}", "without '/'", "not 'train'", uncompiled=made):
        made.fit([BATCH], epochs=1, eval_data={name: [BATCH]})


def test_arrays_given_as_eval_data():
    made = line()
    with refused(TypeError, "ndarray was given as the source", "tk.data.Arrays", uncompiled=made):
        made.fit([BATCH], epochs=1, eval_data=BATCH)


def test_asking_before_there_is_a_state():
    made = line()
    for ask in (made.evaluate, made.predict, lambda data: made.summary(), lambda data: made.state):
        with refused(
            RuntimeError, "no state yet", "trainer.init(batch) or trainer.fit(...)", uncompiled=made
        ):
            ask([BATCH])


def test_weights_and_state_of_the_wrong_kind():
    made = started()
    with refused(ValueError, "weights='best'", "'averaged'", "'live'", uncompiled=made):
        made.evaluate([BATCH], weights="best")
    with refused(TypeError, "trainer.state must be a tk.TrainState", "got dict"):
        made.state = {"params": made.state.params}


def test_a_method_that_is_final():
    for name in ("fit", "evaluate", "predict", "init", "summary", "state", "_engine", "_asked"):
        with refused(
            TypeError, f"Odd overrides {name}", "loss, metrics, batch_axis, train_step", "write a callback"
        ):
            type("Odd", (Line,), {name: lambda self: None})


# Data -------------------------------------------------------------------------------------------------------

UNEQUAL = {"x": BATCH["x"], "y": np.zeros(3, np.float32)}
NAMES = {"x": BATCH["x"], "y": np.array(["a", "b", "c", "d"])}
OBJECTS = {"x": BATCH["x"], "y": np.array([1, None, 2, 3])}
ROWLESS = {"x": np.float32(1.0)}


@pytest.mark.parametrize(
    ("batch", "error", "parts"),
    [
        (UNEQUAL, ValueError, ["different leading sizes", "`x` [4, 2]", "`y` [3]", "first dimension"]),
        (ROWLESS, ValueError, ["no leaf of it has a leading dimension", "`x` []"]),
    ],
    ids=["unequal", "no rows"],
)
@pytest.mark.parametrize("where", ["init", "fit", "evaluate", "predict"])
def test_a_batch(batch, error, parts, where):
    made = started() if where in ("evaluate", "predict") else line()
    with refused(error, *parts, uncompiled=made):
        {
            "init": lambda: made.init(batch),
            "fit": lambda: made.fit([batch], epochs=1),
            "evaluate": lambda: made.evaluate(iter([batch])),
            "predict": lambda: made.predict(iter([batch])),
        }[where]()


@pytest.mark.parametrize("batch", [NAMES, OBJECTS], ids=["strings", "objects"])
@pytest.mark.parametrize("where", ["init", "fit", "evaluate", "predict"])
def test_a_leaf_that_stays_on_the_host_and_that_the_loss_asks_for(batch, where):
    made = started() if where in ("evaluate", "predict") else line()
    with pytest.raises(KeyError, match="y") as caught:
        {
            "init": lambda: made.init(batch),
            "fit": lambda: made.fit([batch], epochs=1),
            "evaluate": lambda: made.evaluate(iter([batch])),
            "predict": lambda: made.predict(iter([batch])),
        }[where]()
    if where == "predict":
        assert "y is not in the batch" in caught.value.args[0]
    else:
        assert any("stays on the host: encode it as numbers" in note for note in caught.value.__notes__)


def test_a_bad_batch_inside_an_epoch_names_the_leaf():
    made = started()
    with refused(ValueError, "different leading sizes", "`x` [4, 2]", "`y` [3]"):
        made.fit(iter([BATCH, UNEQUAL]), epochs=1)
    assert int(made.state.step) == 1
    with refused(TypeError, "y", "<U1"):
        made.fit(iter([BATCH, NAMES]), epochs=1)
    assert made.fit([BATCH], epochs=1).step == 3


@pytest.mark.parametrize("empty", [[], lambda: iter(()), ()], ids=["list", "function", "tuple"])
@pytest.mark.parametrize("where", ["fit", "evaluate", "predict", "eval_data"])
def test_an_empty_source(empty, where):
    made = started()
    # What a function gives is not known before it is called: for the first evaluation, after an epoch.
    unknown = where == "eval_data" and callable(empty)
    with refused(ValueError, "batch", uncompiled=None if unknown else made):
        {
            "fit": lambda: made.fit(empty, epochs=1),
            "evaluate": lambda: made.evaluate(empty),
            "predict": lambda: made.predict(empty),
            "eval_data": lambda: made.fit([BATCH], epochs=1, eval_data=empty),
        }[where]()


def test_an_iterator_at_its_second_epoch():
    made = weight.trainer()
    with refused(ValueError, "list_iterator", "once", "epoch 1", "a list of batches, or a function"):
        made.fit(iter(numbers(1, 2)), epochs=2)
    assert int(made.state.step) == 2


def test_a_source_that_gives_nothing_in_its_second_epoch():
    made = weight.trainer()
    with refused(ValueError, "no batch in epoch 1"):
        made.fit(lambda epoch: iter(numbers(1) if epoch == 0 else []), epochs=2)


def test_one_batch_given_as_the_source():
    made = line()
    with refused(TypeError, "A dict was given as the source", "[batch]", "tk.data.Arrays", uncompiled=made):
        made.fit(BATCH, epochs=1)


# Overridden steps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returns", "error", "parts"),
    [
        (lambda s: None, TypeError, ["train_step returned NoneType", "(state, outputs)", "{'loss': loss}"]),
        (lambda s: s, TypeError, ["train_step returned TrainState", "(state, outputs)"]),
        (lambda s: (s.params, {}), TypeError, ["train_step returned a tuple of 2", "the new TrainState"]),
        (lambda s: (s, 0.5), TypeError, ["train_step returned outputs of type float", "mapping of names"]),
        (lambda s: (s, {"loss": "low"}), TypeError, ["the output loss of type str", "must be arrays"]),
        (lambda s: (s, {}), ValueError, ["metric 'loss'", "asks for the output 'loss'"]),
        (
            lambda s: (s.replace(params={"w": jnp.zeros(2)}), {"loss": 1.0}),
            ValueError,
            ["another structure", "params/w: float32[] -> float32[2]", "state.apply_gradients"],
        ),
        (
            lambda s: (s.replace(collections={"cache": {"k": jnp.zeros(2)}}), {"loss": 1.0}),
            ValueError,
            ["another structure", "collections/cache/k: absent -> float32[2]", "state.replace"],
        ),
    ],
)
def test_a_train_step_that_returns_the_wrong_thing(returns, error, parts):
    class Custom(WeightTrainer):
        def train_step(self, state, batch):
            return returns(state)

    made = Custom(Weight(), SGD)
    with refused(error, *parts, uncompiled=made):
        made.fit(numbers(1), epochs=1)


@pytest.mark.parametrize(
    ("returns", "error", "parts"),
    [
        (lambda b: b, TypeError, ["eval_step returned outputs of type float32[4]", "mapping of names"]),
        (lambda b: {"twice": b}, ValueError, ["metric 'loss'", "asks for the output 'loss'"]),
        (
            lambda b: {"loss": b[:2]},
            ValueError,
            ["metric 'loss'", "float32[2]", "mask is bool[4]", "one row"],
        ),
    ],
)
def test_an_eval_step_that_returns_the_wrong_thing(returns, error, parts):
    class Custom(WeightTrainer):
        def eval_step(self, state, batch):
            return returns(batch)

    made = Custom(Weight(), SGD)
    made.init(numbers(1)[0])
    with refused(error, *parts, uncompiled=made):
        made.evaluate(numbers(1))


@pytest.mark.parametrize(
    ("returns", "parts"),
    [
        (lambda b: b.mean(), ["predict_step returned (root) as float32[]"]),
        (lambda b: {"rows": b, "few": b[:2]}, ["predict_step returned few as float32[2]"]),
    ],
)
def test_a_predict_step_without_rows(returns, parts):
    class Custom(WeightTrainer):
        def predict_step(self, model, batch, ctx):
            return returns(batch)

    made = Custom(Weight(), SGD)
    made.init(numbers(1)[0])
    with refused(ValueError, *parts, "for a batch of 4", "one row per example"):
        made.predict(numbers(1))


@pytest.mark.parametrize(
    ("returns", "parts"),
    [
        (None, ["variables is of type NoneType", "{'params': ..., ...}"]),
        ({"batch_stats": {}}, ["the collections ['batch_stats'] and no 'params'", "model.init returned"]),
    ],
)
def test_init_variables_that_returns_the_wrong_thing(returns, parts):
    class Custom(WeightTrainer):
        def init_variables(self, rng, batch):
            return returns

    with refused((TypeError, ValueError), *parts):
        Custom(Weight(), SGD).init(numbers(1)[0])


# Logs -------------------------------------------------------------------------------------------------------


def test_a_logdir_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    made = started(logdir=tmp_path / "file")
    with refused(
        OSError, "logdir must be a folder that can be created and written to", "file", uncompiled=made
    ):
        made.fit([BATCH], epochs=1)
    with refused(ValueError, "logdir='gs://bucket/run'", "a local folder", "Log to one and copy it"):
        line(logdir="gs://bucket/run")


def test_a_folder_that_another_writer_or_trainer_logs_to(tmp_path):
    made, message = started(logdir=tmp_path), ["live TensorBoard writer", "two would mix", "its own folder"]
    writer = tk.writers.TensorBoardWriter(tmp_path)
    with refused(ValueError, *message, uncompiled=made):
        made.fit([BATCH], epochs=1)
    writer.close()

    class Nested(Callback):
        def on_step(self, info):
            weight.trainer(logdir=tmp_path).fit(numbers(1), epochs=1)

    with refused(ValueError, "another run", f"process {os.getpid()}", "another folder"):
        weight.trainer(Nested(), logdir=tmp_path).fit(numbers(1), epochs=1)
    # It is free again, for one that starts over.
    for _ in range(2):
        weight.trainer(logdir=tmp_path, overwrite=True).fit(numbers(1), epochs=1)
