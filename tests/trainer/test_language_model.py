"""The loss of Flax's language model example (lm1b): a token mean with label smoothing, against it written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clu import metrics
from flax import linen as nn

import trainkit as tk
from tests.helpers.compare import assert_same

VOCAB, TIME, SMOOTHING = 11, 6, 0.1


class Decoder(nn.Module):
    """One block of a decoder; token 0 pads."""

    @nn.compact
    def __call__(self, tokens):
        shifted = jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
        x = nn.Embed(VOCAB, 8)(shifted) + self.param("position", nn.initializers.normal(0.1), (1, TIME, 8))
        mask = nn.make_causal_mask(tokens)
        # Without biases: that of the keys has no gradient but rounding, which Adam makes steps of full size of.
        x = x + nn.MultiHeadDotProductAttention(2, use_bias=False)(nn.LayerNorm()(x), mask=mask)
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))
        return nn.Dense(VOCAB)(nn.LayerNorm()(x))


def weighted_cross_entropy(logits, targets, weights):
    """As in the example: the sum over tokens, less the least that smoothing allows, and the sum of the weights."""
    confidence, low = 1.0 - SMOOTHING, SMOOTHING / (VOCAB - 1)
    least = -(confidence * np.log(confidence) + (VOCAB - 1) * low * np.log(low + 1e-20))
    soft = jax.nn.one_hot(targets, VOCAB) * (confidence - low) + low
    losses = -(soft * nn.log_softmax(logits)).sum(axis=-1) - least
    return losses, (losses * weights).sum(), weights.sum()


class LanguageModel(tk.Trainer):
    metrics = metrics.Collection.create(
        loss=metrics.Average.from_output("loss"),
        perplexity=tk.metrics.Perplexity.from_outputs("nll", weights="token_weights"),
        accuracy=tk.metrics.Accuracy.with_weights("token_weights"),
    )

    def loss(self, model, batch, ctx):
        logits, weights = model(batch), (batch > 0).astype(jnp.float32)
        losses, _, _ = weighted_cross_entropy(logits, batch, weights)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch)
        return tk.Weighted(losses, weights), {
            "logits": logits,
            "labels": batch,
            "nll": nll,
            "token_weights": weights,
        }


def sentences(rows, seed=0):
    draw = np.random.default_rng(seed)
    tokens = draw.integers(1, VOCAB, size=(rows, TIME))
    return np.where(np.arange(TIME) < draw.integers(1, TIME + 1, size=(rows, 1)), tokens, 0).astype(np.int32)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_weighted_token_loss_is_that_of_the_example(accumulate):
    schedule = optax.join_schedules([optax.linear_schedule(0.0, 1e-2, 2), optax.constant_schedule(1e-2)], [2])
    tx = optax.adamw(schedule, b2=0.98, weight_decay=0.1)
    data, held_out = sentences(16), sentences(10, seed=1)
    trainer = LanguageModel(Decoder(), tx, accumulate=accumulate)
    params = trainer.init(data[:4]).params
    moments, size, log = tx.init(params), 8 // accumulate, []
    result = trainer.fit(
        tk.data.Arrays(data, batch_size=size), epochs=2, eval_data=tk.data.Arrays(held_out, batch_size=4)
    )

    @jax.jit
    def step(params, moments, tokens):
        def mean(params):
            weights = (tokens > 0).astype(jnp.float32)
            _, total, count = weighted_cross_entropy(
                Decoder().apply({"params": params}, tokens), tokens, weights
            )
            return total / count, (total, count)

        grads, sums = jax.grad(mean, has_aux=True)(params)
        updates, moments = tx.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, sums

    for number in range(4):
        params, moments, sums = step(params, moments, data[8 * (number % 2) :][:8])
        log.append(sums)
    assert result.step == 4
    assert_same(result.state.params, params, rtol=1e-3, atol=1e-5)
    total, count = np.sum(log, axis=0)  # the example logs the sum of sums over the sum of weights
    assert result.history.last("train/loss") == pytest.approx(total / count, rel=1e-4)

    weights = (held_out > 0).astype(np.float32)
    logits = Decoder().apply({"params": params}, held_out)
    _, total, count = weighted_cross_entropy(logits, held_out, weights)
    nll = np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, held_out))
    hits = (np.asarray(logits).argmax(axis=-1) == held_out) * weights
    expected = {
        "loss": float(total / count),
        "perplexity": np.exp((nll * weights).sum() / weights.sum()),
        "accuracy": hits.sum() / weights.sum(),
    }
    found = {name: result.history.last(f"eval/{name}") for name in expected}
    assert found == pytest.approx(expected, rel=1e-3)
