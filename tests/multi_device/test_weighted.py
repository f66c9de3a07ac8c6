"""Weighted losses on eight devices: the quotient over all of them, not a mean of theirs."""

import jax
import optax
import pytest

import trainkit as tk
from tests.helpers.compare import assert_same
from tests.step.test_weighted import Tagger, TaggerTrainer, cut, descended, expected_loss, tokens


@pytest.mark.parametrize("strategy", ["jit", "vmap", "pmap"])
def test_devices_of_unequal_weight_are_one_quotient(strategy):
    data = tokens(13)  # padded to 16: a device has rows of very unequal weight, or none at all
    micro = cut(data, 8)
    kind = OneByOne if strategy == "vmap" else TaggerTrainer
    trainer = kind(Tagger(), optax.sgd(0.1), strategy=strategy, accumulate=2)
    start = jax.device_get(trainer.init(data).params)
    assert trainer.evaluate(micro)["loss"] == pytest.approx(expected_loss(start, data), rel=1e-5)
    result = trainer.fit(micro, epochs=1)
    params, losses = descended(start, data)
    assert result.history.last("train/loss") == pytest.approx(losses[0], rel=1e-5)
    assert_same(result.state.params, params, rtol=1e-5, atol=1e-6)


class OneByOne(TaggerTrainer):
    def loss(self, model, batch, ctx):
        return tk.Weighted((model(batch["x"]) - batch["y"]) ** 2, batch["w"]), {}
