"""Several steps in one call under every strategy: the numbers of single steps, and the layout of the state kept."""

import jax
import optax
import pytest

import trainkit as tk
from tests.helpers.compare import assert_same
from tests.helpers.digits import Net, NetTrainer, batches
from trainkit._calls.calls import Calls
from trainkit._calls.choice import Choice

STRATEGIES = {
    "data=8": lambda: tk.parallel.Mesh(),
    "data=2, fsdp=4": lambda: tk.parallel.Mesh(fsdp=4),
    "PerExample": lambda: tk.parallel.PerExample(),
    "Pmap": lambda: tk.parallel.Pmap(),
}


def fit(strategy, data, choice, **options):
    """A fit whose steps are put into calls as `choice` says."""
    sizes, begin, call = [], Calls.begin, Calls.__call__

    def spy(self, raw, packed, feds):
        sizes.append(len(feds))
        return call(self, raw, packed, feds)

    callbacks = [tk.callbacks.EMA(0.9), tk.callbacks.LogMetrics(every=tk.Every(steps=5))]
    model = Net(norm=False)
    trainer = NetTrainer(
        model, optax.sgd(0.05, momentum=0.9), strategy=strategy, callbacks=callbacks, **options
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Calls, "begin", lambda self, given, *rest: begin(self, choice, *rest))
        patch.setattr(Calls, "__call__", spy)
        return trainer.fit(data, epochs=3), sizes


@pytest.mark.usefixtures("auto")
@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "scanned") for name in STRATEGIES), ("Pmap", "unrolled")]
)
def test_calls_of_several_steps_under_each_strategy(name, kind):
    # The last batch of a pass is padded.
    data = [*batches(4), *batches(1, rows=5)]
    options = {"accumulate": 2} if kind == "unrolled" else {}
    expected, _ = fit(STRATEGIES[name](), data, Choice(), **options)
    got, sizes = fit(STRATEGIES[name](), data, Choice(kind, 2), **options)
    assert max(sizes) == 2
    assert sum(sizes) == got.step == expected.step
    same = [state.replace(apply_fn=None, tx=None) for state in (got.state, expected.state)]
    assert_same(*same, rtol=2e-6, atol=2e-6)
    assert got.history.last("train/loss") == pytest.approx(expected.history.last("train/loss"), rel=1e-5)
    for leaf, other in zip(jax.tree.leaves(got.state), jax.tree.leaves(expected.state), strict=True):
        assert leaf.sharding.is_equivalent_to(other.sharding, leaf.ndim)
