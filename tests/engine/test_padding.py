"""A loss whose rows depend on what pads their batch is found out before a padded batch counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clu import metrics
from flax import linen as nn

import trainkit as tk

CURES = r"a batch of 2 examples is padded for {}.*'loss'.*drop_last=True.*scalar loss.*ctx\.mask"


def data(rows=10):
    return {"x": np.random.default_rng(0).normal(size=(rows, 5)).astype(np.float32)}


def sources():
    x = data()["x"]
    return {
        "in a loop on the device": tk.data.Arrays(data(), batch_size=4),
        "batch by batch": [{"x": x[:4]}, {"x": x[4:8]}, {"x": x[8:]}],
    }


def contrastive(similarity):
    return optax.softmax_cross_entropy_with_integer_labels(similarity, jnp.arange(len(similarity)))


class Contrastive(tk.Trainer):
    """Every other row of the batch is a negative."""

    def similarity(self, model, batch, ctx):
        code = model(batch["x"])
        return code @ code.T

    def loss(self, model, batch, ctx):
        return contrastive(self.similarity(model, batch, ctx)), {}


class Masked(Contrastive):
    def similarity(self, model, batch, ctx):
        return jnp.where(ctx.mask[None, :], super().similarity(model, batch, ctx), -jnp.inf)


class Scalar(Contrastive):
    def loss(self, model, batch, ctx):
        return super().loss(model, batch, ctx)[0].mean(), {}


def made(kind, model=None, **options):
    return kind(nn.Dense(3) if model is None else model, optax.sgd(0.1), **options)


def by_hand(params, batches):
    losses = []
    for x in batches:
        code = np.asarray(nn.Dense(3).apply({"params": params}, x))
        losses.append(np.asarray(contrastive(code @ code.T)))
    return np.concatenate(losses).mean()


@pytest.mark.parametrize("way", sources())
def test_mixing_is_found_before_an_evaluation_counts_it(way):
    trainer = made(Contrastive)
    trainer.init(data())
    with pytest.raises(ValueError, match=CURES.format("evaluation")):
        trainer.evaluate(sources()[way])


@pytest.mark.parametrize("way", sources())
def test_mixing_is_found_before_a_padded_step(way):
    trainer = made(Contrastive)
    with pytest.raises(ValueError, match=CURES.format("training")):
        trainer.fit(sources()[way], epochs=1)
    assert int(trainer.state.step) == 2  # those before it were of full batches, and are right


def test_mixing_is_found_among_micro_batches_and_examples():
    with pytest.raises(ValueError, match=CURES.format("training")):
        made(Contrastive, accumulate=2).fit(sources()["batch by batch"], epochs=1)

    class Centred(tk.Trainer):
        def loss(self, model, batch, ctx):
            code = model(batch["x"])
            mean = code if model.is_initializing() else jax.lax.pmean(code, "batch")
            return ((code - mean) ** 2).sum(), {}

    with pytest.raises(ValueError, match=CURES.format("training")):
        made(Centred, strategy="vmap").fit(sources()["batch by batch"], epochs=1)


@pytest.mark.parametrize("kind", [Masked, Scalar])
def test_both_cures_are_exact(kind):
    trainer, x = made(kind), data()["x"]
    params = trainer.init(data()).params
    for source in sources().values():
        found = trainer.evaluate(source)["loss"]
        assert found == pytest.approx(by_hand(params, [x[:4], x[4:8], x[8:]]), rel=1e-5)
        trainer.fit(source, epochs=1)
        trainer.state = trainer.state.replace(params=params)


def test_batches_that_need_no_padding_may_mix():
    trainer, x = made(Contrastive), data(8)["x"]
    params = trainer.init(data()).params
    found = trainer.evaluate(tk.data.Arrays({"x": x}, batch_size=4))["loss"]
    assert found == pytest.approx(by_hand(params, [x[:4], x[4:]]), rel=1e-5)
    trainer.fit(tk.data.Arrays(data(), batch_size=4, drop_last=True), epochs=2)


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(1)(nn.Dropout(0.5, deterministic=not train)(x))[:, 0]


class Rows(tk.Trainer):
    metrics = metrics.Collection.create(
        loss=metrics.Average.from_output("loss"), size=metrics.Average.from_output("size")
    )

    def loss(self, model, batch, ctx):
        code = model(batch["x"], ctx.train)
        hole = jnp.where(ctx.mask, 0.0, jnp.nan)  # what pads is NaN
        return code**2 + hole, {"size": jnp.abs(code).mean() if self.looks else jnp.float32(1)}

    looks = False


def test_rows_for_themselves_are_left_alone():
    trainer = made(Rows, Noisy())
    for source in sources().values():
        trainer.fit(source, epochs=1, eval_data=source)
    assert np.isfinite(trainer.history.last("eval/loss"))
    assert trainer.state.step == 6


def test_a_scalar_output_that_sees_the_padding_is_named_once(caplog):
    trainer = made(Rows, Noisy())
    trainer.looks = True
    trainer.init(data())
    trainer.state = trainer.state.replace(step=jnp.int32(1))
    for _ in range(2):
        trainer.evaluate(sources()["batch by batch"])
    assert sum("'size' is of a scalar output" in record.message for record in caplog.records) == 1


def test_weights_that_are_shared_out_over_the_batch_are_found():
    class Shared(tk.Trainer):
        def loss(self, model, batch, ctx):
            losses = (model(batch["x"]) ** 2).sum(axis=1)
            return tk.Weighted(losses, jax.nn.softmax(batch["x"][:, 0])), {}

    with pytest.raises(ValueError, match=r"padded for training.*'weight'"):
        made(Shared).fit(sources()["batch by batch"], epochs=1)


def test_a_model_that_is_constant_at_first_is_looked_at_again():
    class Late(Contrastive):
        def loss(self, model, batch, ctx):
            code = model(batch["x"])
            return contrastive(code @ code.T) + ((code - 1) ** 2).sum(axis=1), {}

    trainer = made(Late, nn.Dense(3, kernel_init=nn.initializers.zeros))
    full = {"x": data()["x"][:4]}
    trainer.init(full)
    trainer.evaluate(sources()["batch by batch"])  # nothing to be seen yet: all codes are 0
    trainer.fit([full], steps=2)
    with pytest.raises(ValueError, match=CURES.format("evaluation")):
        trainer.evaluate(sources()["batch by batch"])


@pytest.mark.parametrize("same", [False, True])
def test_one_real_row_is_enough(same):
    x = np.ones_like(data(5)["x"]) if same else data(5)["x"]
    trainer = made(Contrastive)
    trainer.init({"x": x})
    with pytest.raises(ValueError, match="a batch of 1 examples is padded for evaluation"):
        trainer.evaluate([{"x": x[:4]}, {"x": x[4:]}])


def test_a_trained_trainer_looks_once():
    trainer, runs = made(Masked), []
    trainer.fit([{"x": data()["x"][:4]}], steps=1)
    compare = trainer._engine.padding._compare
    trainer._engine.padding._compare = lambda *args: (runs.append(args[0]), compare(*args))
    for source in (*sources().values(), *sources().values()):
        trainer.evaluate(source)
        trainer.fit(source, epochs=1)
    assert sorted(runs) == ["evaluation", "training"]
