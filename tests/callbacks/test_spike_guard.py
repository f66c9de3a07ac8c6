"""`SpikeGuard` against its rule written out in NumPy, on losses that are known beforehand."""

import jax
import numpy as np
import optax
import pytest

import trainkit as tk
from tests.helpers.compare import assert_same
from tests.helpers.digits import Net, NetTrainer, batches
from tests.helpers.weight import Weight, WeightTrainer, numbers
from trainkit.callbacks import SpikeGuard

EACH = tk.Every(steps=1)


def rule(values, factor, window, patience=50):
    """Returns which of `values` are refused."""
    accepted, refused, in_row = [], [], 0
    for value in values:
        full = len(accepted) >= window
        refused.append(bool(full and value > factor * np.median(accepted[-window:])))
        if refused[-1]:
            in_row += 1
            if in_row >= patience:
                accepted, in_row = [], 0
        elif np.isfinite(value):
            accepted.append(value)
            in_row = 0
    return refused


def guarded(losses, of="loss", *callbacks, **options):
    """Trains on batches of those losses, whose gradient is the same number; returns the weight and the history."""
    guard = SpikeGuard(of=of, every=EACH, **options)
    trainer = WeightTrainer(Weight(), optax.sgd(1.0), callbacks=[guard, *callbacks])
    result = trainer.fit(numbers(*losses), epochs=1)
    assert result.step == len(losses)
    counts = [count for _, count in result.history["spikes/refused"]]
    return float(result.state.params["w"]), np.diff([0, *counts]).astype(bool).tolist()


@pytest.mark.parametrize("of", ["loss", "grad_norm"])
@pytest.mark.parametrize(("factor", "window"), [(2.0, 4), (1.5, 5), (3.0, 1)])
def test_what_is_refused(of, factor, window):
    rng = np.random.default_rng(0)
    losses = np.where(rng.random(60) < 0.2, 6.0, 1.0) * rng.uniform(0.8, 1.2, 60).astype(np.float32)
    expected = rule(losses, factor, window)
    weight, refused = guarded(losses, of, factor=factor, window=window)
    assert refused == expected
    assert 0 < sum(expected) < 20
    np.testing.assert_allclose(weight, -losses[~np.array(expected)].sum(), rtol=1e-5)


def test_strictly_above_and_once_there_are_that_many():
    # The first two are accepted whatever they are; the median of 1 and 3 is 2.
    assert guarded([1, 3, 4, 4.01], factor=2.0, window=2)[1] == [False, False, False, False]
    assert guarded([1, 3, 4.01], factor=2.0, window=2)[1] == [False, False, True]
    assert guarded([100, 1, 2.01, 2], factor=2.0, window=1)[1] == [False, False, True, False]


def test_a_level_is_no_spike():
    losses = [1, 1, 1, *[9] * 6, 20, 9]
    expected = rule(losses, 2.0, 3, patience=3)
    assert expected == [False] * 3 + [True] * 3 + [False] * 3 + [True, False]
    assert guarded(losses, factor=2.0, window=3, patience=3)[1] == expected


def test_a_refused_step_leaves_everything_but_the_count():
    data = batches(6)
    spoilt = {"x": 300 * data[3]["x"], "y": data[3]["y"]}
    callbacks = [SpikeGuard(3.0, 3, "grad_norm"), tk.callbacks.EMA(0.9)]
    trainer = NetTrainer(Net(norm=False), optax.adam(1e-2), callbacks=callbacks)
    before = jax.device_get(trainer.fit(data[:3], epochs=1).state)
    after = jax.device_get(trainer.fit([spoilt], epochs=1).state)
    for name in ("params", "opt_state"):
        assert_same(getattr(after, name), getattr(before, name))
    assert_same(after.hooks["ema"], before.hooks["ema"])
    assert int(after.step) == int(before.step) + 1
    assert int(after.hooks["spikes"].refused) == 1


def test_what_is_not_finite_is_no_level():
    losses = [1, 1, np.inf, np.nan, 1, 3]
    refused = guarded(losses, "loss", tk.callbacks.NanGuard("skip"), factor=2.0, window=2)[1]
    assert refused == [False, False, True, False, False, True]
    # Before there are enough values nothing is refused, and nothing that is not finite is one of them.
    begun = guarded([np.inf, np.nan, 1, 1, 3], "loss", tk.callbacks.NanGuard("skip"), factor=2.0, window=2)
    assert begun[1] == [False] * 4 + [True]


def test_an_overflow_in_float16_is_the_loss_scales():
    data = batches(4)
    trainer = NetTrainer(
        Net(norm=False),
        optax.sgd(0.1),
        precision="float16",
        callbacks=[SpikeGuard(2.0, 1, "grad_norm", every=EACH)],
    )
    state = trainer.fit(data[:1], epochs=1).state
    scale = state.hooks["loss_scale"].replace(scale=np.float32(2.0**40))
    trainer.state = state.replace(hooks={**state.hooks, "loss_scale": scale})
    result = trainer.fit(data[1:2], epochs=1)
    assert float(result.state.hooks["loss_scale"].scale) == 2.0**39
    assert int(result.state.hooks["spikes"].refused) == 0


class Own(NetTrainer):
    told = True

    def train_step(self, state, batch):
        state, outputs = super().train_step(state, batch)
        return state, outputs if self.told else {name: outputs[name] for name in ("logits", "labels")}


def test_a_step_of_ones_own_must_tell():
    data = batches(3)
    Own(Net(norm=False), optax.sgd(0.1), callbacks=[SpikeGuard(window=1)]).fit(data, epochs=1)
    with pytest.raises(ValueError, match=r"of='grad_norm'.*tells no gradients"):
        Own(Net(norm=False), optax.sgd(0.1), callbacks=[SpikeGuard(of="grad_norm")]).fit(data, epochs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 0}, r"factor=0\): must be a finite number above 0"),
        ({"factor": float("inf")}, "factor=inf"),
        ({"window": 0}, r"window=0\): must be an int of at least 1"),
        ({"window": 2.5}, r"window=2\.5"),
        ({"patience": 0}, "patience=0"),
        ({"of": "gradient"}, r"of='gradient'\): the choices are 'loss', 'grad_norm'"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        SpikeGuard(**options)
    with pytest.raises(TypeError, match="every=3"):
        SpikeGuard(every=3)


def test_two_have_names_of_their_own():
    guards = [SpikeGuard(2.0, 1, every=EACH), SpikeGuard(2.0, 1, "grad_norm", every=EACH, name="large")]
    history = WeightTrainer(Weight(), optax.sgd(1.0), callbacks=guards).fit(numbers(1, 9), epochs=1).history
    assert history["spikes/refused"] == history["large/refused"] == [(1, 0), (2, 1)]
