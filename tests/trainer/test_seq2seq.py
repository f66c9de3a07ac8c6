"""Flax's sequence to sequence example without teacher forcing, against the same loop written by hand."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clu import metrics
from flax import linen as nn

import trainkit as tk
from tests.helpers.compare import assert_same

VOCAB, HIDDEN, IN, OUT = 7, 8, 5, 4
START, END = 0, 1


class DecoderCell(nn.Module):
    """One step, whose input is what the step before drew."""

    @nn.compact
    def __call__(self, carry, _):
        rng, lstm, last = carry
        rng, draw = jax.random.split(rng)
        lstm, output = nn.LSTMCell(HIDDEN)(lstm, jax.nn.one_hot(last, VOCAB))
        logits = nn.Dense(VOCAB)(output)
        drawn = jax.random.categorical(draw, logits) if self.sample else logits.argmax(axis=-1)
        return (rng, lstm, drawn.astype(jnp.int32)), (logits, drawn)

    sample: bool


class Seq2seq(nn.Module):
    @nn.compact
    def __call__(self, source, length, *, sample):
        encode = nn.RNN(nn.LSTMCell(HIDDEN), return_carry=True, name="encoder")
        lstm, _ = encode(jax.nn.one_hot(source, VOCAB), seq_lengths=length)
        decode = nn.scan(
            DecoderCell,
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
        )(sample, name="decoder")
        carry = self.make_rng("decode"), lstm, jnp.full(len(source), START, jnp.int32)
        return decode(carry, jnp.zeros((len(source), OUT, 0)))[1]


class Seq2seqTrainer(tk.Trainer):
    metrics = metrics.Collection.create(
        loss=tk.metrics.Mean.from_output("loss"), accuracy=tk.metrics.Accuracy.with_weights("token_weights")
    )

    def loss(self, model, batch, ctx):
        logits, _ = model(batch["source"], batch["length"], sample=ctx.train)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["target"])
        weights = up_to_end(batch["target"])
        return tk.Weighted(losses, weights), {
            "logits": logits,
            "labels": batch["target"],
            "token_weights": weights,
        }

    def predict_step(self, model, batch, ctx):
        return model(batch["source"], batch["length"], sample=False)[1]


def up_to_end(target):
    """1 for every token up to the one that ends the sequence."""
    return (jnp.cumsum(target == END, axis=1) - (target == END) == 0).astype(jnp.float32)


def sequences(rows, seed=0):
    draw = np.random.default_rng(seed)
    target = draw.integers(2, VOCAB, size=(rows, OUT))
    target[np.arange(rows), draw.integers(OUT, size=rows)] = END
    return {
        "source": draw.integers(2, VOCAB, size=(rows, IN)).astype(np.int32),
        "length": draw.integers(1, IN + 1, size=rows).astype(np.int32),
        "target": target.astype(np.int32),
    }


def quotient(params, batch, key, sample):
    logits, _ = Seq2seq().apply(
        {"params": params}, batch["source"], batch["length"], sample=sample, rngs={"decode": key}
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["target"])
    weights = up_to_end(batch["target"])
    return (losses * weights).sum() / weights.sum(), logits


def test_what_was_drawn_is_the_next_input_in_training_and_evaluation():
    batches, tx = [sequences(6), sequences(6, seed=1)], optax.adam(1e-2)
    trainer = Seq2seqTrainer(Seq2seq(), tx)
    state = trainer.init(batches[0])
    params, moments = state.params, tx.init(state.params)
    held_out = sequences(10, seed=2)
    result = trainer.fit(batches, epochs=2, eval_data=tk.data.Arrays(held_out, batch_size=4))

    @jax.jit
    def step(params, moments, batch, key):
        grads = jax.grad(quotient, has_aux=True)(params, batch, key, True)[0]
        updates, moments = tx.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments

    for number in range(4):
        params, moments = step(params, moments, batches[number % 2], jax.random.fold_in(state.rng, number))
    assert_same(result.state.params, params, rtol=1e-4, atol=1e-5)
    loss, logits = quotient(params, held_out, jax.random.key(0), False)
    weights = np.asarray(up_to_end(held_out["target"]))
    hits = (np.asarray(logits).argmax(axis=-1) == held_out["target"]) * weights
    assert result.history.last("eval/loss") == pytest.approx(float(loss), rel=1e-4)
    assert result.history.last("eval/accuracy") == pytest.approx(hits.sum() / weights.sum())
    predicted = trainer.predict(tk.data.Arrays({k: held_out[k] for k in ("source", "length")}, batch_size=4))
    np.testing.assert_array_equal(predicted, np.asarray(logits).argmax(axis=-1))
    assert flax.core.unfreeze(result.state.model_state) == {}
