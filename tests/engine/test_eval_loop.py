"""Evaluations of light steps in a loop on the device: the numbers of batches handed over one by one."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clu import metrics
from flax import linen as nn

import trainkit as tk
from tests.helpers.digits import CLASSES, Net, NetTrainer, arrays
from trainkit._core.jaxprs import convolves, is_light
from trainkit._loop.evaluate import evaluate


def trained(trainer=None):
    trainer = trainer or NetTrainer(Net(), optax.adam(1e-2))
    trainer.fit(tk.data.Arrays(arrays(64), 16), epochs=1)
    trainer.evaluate(tk.data.Arrays(arrays(20), 16))  # padding is looked at once, in calls of its own
    return trainer


def calls_of(trainer, source):
    """Returns the metrics of `source`, and how many calls of a step they took."""
    count, prepare = 0, trainer._engine.prepare_eval

    def prepare_counting(*args):
        prepared = prepare(*args)

        def step(*args):
            nonlocal count
            count += 1
            return prepared.step(*args)

        return prepared._replace(step=step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer._engine, "prepare_eval", prepare_counting)
        return trainer.evaluate(source), count


@pytest.mark.parametrize(
    ("rows", "batch_size", "options", "calls"),
    [
        (64, 16, {}, 1),
        (1000, 5, {}, 7),  # 200 batches, 32 a call
        (1003, 5, {}, 7),  # a last batch of three
        (1003, 5, {"drop_last": True}, 7),
        (1003, 5, {"shuffle": True, "drop_last": True, "seed": 3}, 7),
        (5000, 5, {}, 32),  # more than one segment of what is carried
        (7, 16, {}, 1),  # less than a batch
    ],
)
def test_the_numbers_are_those_of_numpy(rows, batch_size, options, calls):
    trainer, source = trained(), tk.data.Arrays(arrays(rows, seed=5), batch_size, **options)
    given = [*source.in_order().batches(0)]  # all rows, also of a source that drops or shuffles some
    data = {name: np.concatenate([batch[name] for batch in given]) for name in given[0]}
    variables = {"params": trainer.state.params, "batch_stats": trainer.state.batch_stats}
    logits = np.asarray(Net().apply(variables, data["x"], train=False), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found, count = calls_of(trainer, source)
    assert count == calls
    assert found["loss"] == pytest.approx(-log_p[np.arange(len(logits)), data["y"]].mean(), rel=1e-5)
    assert found["accuracy"] == np.mean(logits.argmax(-1) == data["y"])


def test_other_sizes_of_the_data_share_a_program(caplog):
    trainer = trained()
    for rows in (48, 1003, 64):
        trainer.evaluate(tk.data.Arrays(arrays(rows), 16))
    assert "compiled again" not in caplog.text


class Scalar(NetTrainer):
    def loss(self, model, batch, ctx):
        losses, outputs = super().loss(model, batch, ctx)
        return losses.mean(), outputs


def test_a_scalar_loss_is_looped_where_every_batch_is_full():
    trainer = trained(Scalar(Net(), optax.adam(1e-2)))
    full, partial = (tk.data.Arrays(arrays(rows), 16) for rows in (48, 56))
    found, calls = calls_of(trainer, full)
    assert calls == 1
    batches = list(full.batches(0))
    assert found == pytest.approx(trainer.evaluate(lambda epoch: iter(batches)), rel=1e-5)
    assert calls_of(trainer, partial)[1] == 4


class OwnEval(NetTrainer):
    def eval_step(self, state, batch):
        logits = state.apply_fn(state.variables, batch["x"], train=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return {"loss": losses, "logits": logits, "labels": batch["y"]}


def test_a_step_of_the_users_own_is_looped_too():
    trainer, source = trained(OwnEval(Net(), optax.adam(1e-2))), tk.data.Arrays(arrays(55), 16)
    found, calls = calls_of(trainer, source)
    assert calls == 1
    assert found == pytest.approx(trained().evaluate(source), rel=1e-5)


class Wide(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(CLASSES)(nn.relu(nn.Dense(2**15)(x)))


class Convolved(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(CLASSES)(nn.Conv(4, (3,))(x[..., None]).reshape(len(x), -1))


@pytest.mark.parametrize("model", [Wide(), Convolved()], ids=["wide", "convolved"])
def test_other_steps_are_called_batch_by_batch(model):
    trainer = trained(NetTrainer(model, optax.sgd(1e-2)))
    assert calls_of(trainer, tk.data.Arrays(arrays(64), 16))[1] == 4


class Changed(tk.data.Source):
    """A source of the user's own that may do anything."""

    def __init__(self):
        self.inner = tk.data.Arrays(arrays(64), 16)
        self.steps_per_epoch, self.num_examples, self.batch_size, self.seekable = 4, 64, 16, True

    def batches(self, epoch, start=0):
        return self.inner.batches(epoch, start)


def test_other_sources_are_called_batch_by_batch():
    assert calls_of(trained(), Changed())[1] == 4


@flax.struct.dataclass
class Median(metrics.Collection):
    median: tk.metrics.collecting(["loss"], lambda rows: np.median(rows["loss"]))


class Collects(NetTrainer):
    metrics = Median


def test_rows_that_are_collected_come_batch_by_batch():
    trainer = trained(Collects(Net(), optax.adam(1e-2)))
    assert calls_of(trainer, tk.data.Arrays(arrays(64), 16))[1] == 4


def test_it_can_be_interrupted_between_calls():
    trainer, source = trained(), tk.data.Arrays(arrays(1000), 5)
    asked = iter([False, False, True])
    assert evaluate(trainer._engine, trainer.state, source, lambda calls, running: next(asked)) is None


def test_what_counts_as_light():
    def light(fn, *shapes):
        return is_light(
            jax.make_jaxpr(fn)(*[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]).jaxpr
        )

    assert light(jnp.dot, (64, 64), (64, 64))
    assert not light(jnp.dot, (512, 512), (512, 512))  # its arguments
    assert not light(lambda x: jnp.outer(x, x).sum(), (600,))  # what it makes
    assert not light(lambda x: jax.lax.fori_loop(0, 9, lambda _, y: jnp.sin(y), x), (4,))
    assert not light(lambda x: jax.lax.scan(lambda c, y: (c + y, None), 0.0, x)[0], (4,))


def test_convolutions_are_found_however_deep():
    def deep(x):
        inner = lambda y: jnp.convolve(y, jnp.ones(3))  # noqa: E731
        return jax.jit(lambda y: jax.lax.fori_loop(0, 2, lambda _, z: jax.checkpoint(inner)(z)[:-2], y))(x)

    assert convolves(jax.make_jaxpr(deep)(jnp.ones(8)).jaxpr)
    assert not convolves(jax.make_jaxpr(jnp.sin)(jnp.ones(8)).jaxpr)
