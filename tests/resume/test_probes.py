"""A run whose callbacks look into its steps, broken off and resumed: the same values, once each, to the last bit."""

import jax
import numpy as np
import optax
import pytest

import trainkit as tk
from tests.helpers.compare import assert_same
from tests.helpers.digits import Net, NetTrainer, batches
from tests.helpers.runs import scalars_of, sigterm_at

DATA = batches(6)
made = tk.callbacks


def loss_of(values):
    return values.loss


def all_kinds():
    return [
        made.Watch(tk.Every(steps=3), by_layer=False),
        made.GradientNoiseScale(tk.Every(steps=2)),
        made.ActivationStats(tk.At(steps=(4, 9))),
        made.SpikeGuard(1.02, 2, every=tk.Every(steps=4)),
    ]


def by_pass(often):
    """One due at the end of a pass, and one in between."""
    return [
        made.Watch(tk.Every(epochs=1), "updates", by_layer=False),
        made.Probe(loss_of, every=tk.Every(steps=often)),
    ]


def train(logdir, data, callbacks, *more, resume=False):
    saving = made.Checkpoint(every=tk.Every(steps=5))
    trainer = NetTrainer(
        Net(norm=False),
        optax.sgd(0.1),
        callbacks=[saving, *callbacks, *more],
        logdir=logdir,
        steps_per_call=4,
    )
    return trainer.fit(data, epochs=2, resume=resume)


@pytest.mark.parametrize(
    ("kinds", "data", "at", "watched"),
    [
        (all_kinds, DATA, 5, [3, 6, 9, 12]),
        # The length of a pass is not known: its last step is told where another callback has it probed, else the next.
        (lambda: by_pass(4), lambda: iter(DATA), 6, [7, 12]),
        (lambda: by_pass(3), lambda: iter(DATA), 6, [6, 12]),
    ],
    ids=["all kinds", "told late", "told in time"],
)
def test_a_run_that_was_broken_off(tmp_path, kinds, data, at, watched):
    whole = train(tmp_path / "whole", data, kinds())
    broken = train(tmp_path / "broken", data, kinds(), sigterm_at(at))
    assert (broken.stopped_by, broken.step) == ("SIGTERM", at)
    resumed = train(tmp_path / "broken", data, kinds(), resume=True)
    assert_same(jax.device_get(resumed.state.params), jax.device_get(whole.state.params))
    assert_same(jax.device_get(resumed.state.hooks), jax.device_get(whole.state.hooks))
    expected, found = scalars_of(tmp_path / "whole"), scalars_of(tmp_path / "broken")
    assert found == expected
    assert sorted(step for step, name in found[0] if name == "watch/update_ratio") == watched
    assert np.isfinite(list(found[0].values())).all()
    if kinds is all_kinds:
        assert int(resumed.state.hooks["spikes"].refused) > 0
