"""A fit under `jax.debug_nans`: what is raised, and what is left of the trainer."""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

import trainkit as tk
from tests.helpers.compare import assert_same

X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
GOOD, BAD = {"x": X}, {"x": np.full((4, 3), np.nan, np.float32)}


class Square(tk.Trainer):
    def loss(self, model, batch, ctx):
        return (model(batch["x"]) ** 2).mean(-1), {}


@pytest.mark.parametrize("again", [False, True])
def test_a_nan_under_debug_nans_names_step_and_guard_and_leaves_the_state_before_it(again):
    trainer = Square(nn.Dense(2), optax.adam(1e-2))
    hand = Square(nn.Dense(2), optax.adam(1e-2))
    if again:  # what was compiled before, which takes the buffers of its state, is not used
        trainer.fit([GOOD], steps=1)
        hand.fit([GOOD], steps=1)
    done = int(again) + 2
    with jax.debug_nans(True), pytest.raises(FloatingPointError) as caught:
        trainer.fit([GOOD, GOOD, BAD, GOOD], epochs=1)
    notes = "".join(caught.value.__notes__)
    assert f"step {done + 1}" in notes
    assert "NanGuard" in notes
    hand.fit([GOOD, GOOD], epochs=1)
    assert int(trainer.state.step) == done
    assert_same(trainer.state.params, hand.state.params, rtol=1e-6)
    assert_same(trainer.state.opt_state, hand.state.opt_state, rtol=1e-6)
    with jax.debug_nans(True):
        assert np.isfinite(trainer.evaluate([GOOD])["loss"])
    result = trainer.fit([GOOD], steps=1)
    assert_same(result.state.params, hand.fit([GOOD], steps=1).state.params, rtol=1e-6)
    assert result.step == done + 1
