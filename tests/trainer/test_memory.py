"""What a trainer holds, and for how long."""

import gc
import weakref

import numpy as np
import optax
import pytest
from flax import linen as nn

import trainkit as tk


class Line(tk.Trainer):
    def loss(self, model, batch, ctx):
        return ((model(batch["x"]) - batch["y"]) ** 2).mean(axis=-1), {}


def used(**options):
    """Weak references to a trainer that has fitted, evaluated and predicted, to its engine and to its data."""
    x = np.ones((24, 3), np.float32)
    data = tk.data.Arrays({"x": x, "y": x[:, :1]}, batch_size=8)
    trainer = Line(nn.Dense(1), optax.sgd(0.1), callbacks=[tk.callbacks.EMA(0.9)], **options)
    trainer.fit(data, epochs=2, eval_data=data)
    trainer.evaluate(data)
    trainer.evaluate(data, weights="live")
    trainer.predict(data)
    return [weakref.ref(one) for one in (trainer, trainer._engine, x)]


@pytest.mark.parametrize("options", [{}, {"strategy": "pmap"}, {"steps_per_call": 2}], ids=str)
def test_a_dropped_trainer_is_freed_with_its_programs_and_its_data(options):
    held = used(**options)
    gc.collect()
    assert [one() for one in held] == [None, None, None]
