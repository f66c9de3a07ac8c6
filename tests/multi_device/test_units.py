"""Batches that are one unit on eight devices: whole on each."""

import jax
import optax
import pytest

from tests.helpers.compare import assert_same
from tests.trainer.test_units import Convolution, GraphTrainer, by_hand, quotient, units
from trainkit.parallel import Mesh


@pytest.mark.parametrize("strategy", ["jit", Mesh(fsdp=8)])
def test_a_unit_is_whole_on_each_device(strategy):
    data = units(3)
    trainer = GraphTrainer(Convolution(), optax.sgd(0.1), strategy=strategy)
    start = (
        GraphTrainer(Convolution(), optax.sgd(0.1), strategy=Mesh(devices=jax.devices()[:1]))
        .init(data[0])
        .params
    )
    result = trainer.fit(data, epochs=1, eval_data=data)
    params = by_hand(start, optax.sgd(0.1), [[batch] for batch in data])
    assert_same(result.state.params, params, rtol=1e-5, atol=1e-6)
    assert result.history.last("eval/loss") == pytest.approx(float(quotient(params, data)), rel=1e-5)
    assert [one["logits"].shape for one in trainer.predict(data)] == [(4, 3)] * 3
