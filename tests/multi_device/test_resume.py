"""A run saved on one layout of the devices goes on on another: the same examples, the same numbers."""

import dataclasses
import functools
import shutil
from collections.abc import Callable

import jax
import numpy as np
import optax
import pytest

import trainkit as tk
from tests.helpers.digits import Net, NetTrainer, arrays
from trainkit._core.tree import named_leaves
from trainkit.checkpoint._store import Store
from trainkit.parallel import Mesh, PerExample, Pmap

# Sums over devices are taken in another order: after 16 steps this much in float32 and no more.
CLOSE = {"rtol": 1e-4, "atol": 5e-6}
SAVED, STEPS, EVERY = 9, 16, tk.Every(steps=4)  # 6 steps a pass: saved in the middle of the second
RULES = [("Dense_0/kernel", ("fsdp", "tensor")), ("Dense_1/kernel", ("tensor", "fsdp"))]


def first(count):
    return jax.devices()[:count]


LAYOUTS: dict[str, Callable[[], tk.parallel.Strategy]] = {
    "jit 8": Mesh,
    "jit 2": lambda: Mesh(devices=first(2)),
    "jit 1": lambda: Mesh(devices=first(1)),
    "fsdp 8": lambda: Mesh(fsdp=8),
    "fsdp 2": lambda: Mesh(fsdp=2, devices=first(2)),
    "fsdp 4, tensor 2": lambda: Mesh(fsdp=4, tensor=2, rules=RULES),
    "PerExample 8": PerExample,
    "PerExample 1": lambda: PerExample(devices=first(1)),
    "Pmap 8": Pmap,
    "Pmap 2": lambda: Pmap(devices=first(2)),
}
PAIRS = [
    *((name, name) for name in ("jit 8", "fsdp 8", "fsdp 4, tensor 2", "PerExample 8", "Pmap 8")),
    ("jit 8", "jit 2"),
    ("jit 2", "jit 1"),
    ("jit 1", "jit 8"),
    ("jit 8", "fsdp 8"),
    ("fsdp 8", "fsdp 4, tensor 2"),
    ("fsdp 8", "fsdp 2"),
    ("fsdp 4, tensor 2", "jit 1"),
    ("PerExample 8", "PerExample 1"),
    ("Pmap 8", "Pmap 2"),
    ("Pmap 8", "jit 8"),
]
FOUND = {}


@pytest.fixture(scope="module", autouse=True)
def _matrix():
    """Prints the largest difference from the run that was never broken off, for those who run this with -s."""
    yield
    print(f"\n{'saved on':<18}{'gone on with on':<18}{'same layout as saved on':>24}{'one device':>14}")
    for (before, after), (own, one) in FOUND.items():
        print(f"{before:<18}{after:<18}{own:>24.1e}{one:>14.1e}")


class Seen(tk.data.Arrays):
    """Remembers which examples were asked for, in order."""

    def __init__(self):
        data = arrays()
        super().__init__({**data, "id": np.arange(len(data["y"]))}, 16, shuffle=True, seed=2)
        self.log = []

    def batches(self, epoch, start=0):
        for batch in super().batches(epoch, start):
            self.log.append(batch["id"].tolist())
            yield batch


@dataclasses.dataclass
class Ran:
    result: tk.FitResult
    leaves: dict
    seen: list


def trainer(layout, logdir=None):
    callbacks = [tk.callbacks.EMA(0.9), tk.callbacks.LogMetrics(EVERY)]
    callbacks += [] if logdir is None else [tk.callbacks.Checkpoint(tk.Never())]
    return NetTrainer(
        Net(norm=True, rate=0.0, axis_name=None if layout.startswith(("jit", "fsdp")) else "batch"),
        # Not Adam: it makes much of the rounding in gradients that are zero, as that of a bias before a norm.
        optax.sgd(0.05, momentum=0.9),
        strategy=LAYOUTS[layout](),
        callbacks=callbacks,
        logdir=logdir,
    )


def run(layout, logdir, steps):
    made, data = trainer(layout, logdir), Seen()
    result = made.fit(data, steps=steps, resume=True)
    state = result.state.replace(rng=jax.random.key_data(result.state.rng))
    named = jax.tree_util.tree_leaves_with_path(jax.device_get(state))
    return Ran(result, {jax.tree_util.keystr(path): leaf for path, leaf in named}, data.log)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run on a layout that was never broken off."""
    return functools.cache(lambda layout: run(layout, tmp_path_factory.mktemp("whole"), STEPS))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a checkpoint in the middle of a run on a layout."""

    @functools.cache
    def save(layout):
        logdir = tmp_path_factory.mktemp("saved")
        return logdir, run(layout, logdir, SAVED).seen

    return save


def difference(a, b):
    """The largest difference between two states and their histories."""
    assert a.leaves.keys() == b.leaves.keys()
    assert a.result.history.keys() == b.result.history.keys()
    pairs = [(leaf, b.leaves[name]) for name, leaf in a.leaves.items()]
    pairs += [(np.array(rows), np.array(b.result.history[name])) for name, rows in a.result.history.items()]
    for one, other in pairs:
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
    return max(float(np.abs(one.astype(np.float64) - other).max(initial=0)) for one, other in pairs)


@pytest.mark.parametrize(("before", "after"), PAIRS, ids=lambda name: name.replace(", ", "-"))
def test_a_run_goes_on_on_another_layout(saved, whole, tmp_path, before, after):
    folder, seen = saved(before)
    found = run(after, shutil.copytree(folder, tmp_path / "run"), STEPS)
    own, one = whole(before), whole("jit 1")
    # The loop looks one batch ahead.
    assert seen[:SAVED] + found.seen[: STEPS - SAVED] == one.seen[:STEPS]
    assert (found.result.step, found.result.epoch) == (STEPS, 3)
    FOUND[before, after] = difference(found, own), difference(found, one)
    if before == after:
        assert FOUND[before, after][0] == 0.0
    for name, leaf in found.leaves.items():
        np.testing.assert_allclose(leaf, one.leaves[name], err_msg=name, **CLOSE)
    for name, rows in found.result.history.items():
        np.testing.assert_allclose(rows, one.result.history[name], err_msg=name, rtol=2e-4)


@pytest.mark.parametrize(
    ("after", "has_state"),
    [("fsdp 8", True), ("fsdp 4, tensor 2", False), ("fsdp 2", True), ("fsdp 2", False), ("jit 2", False)],
)
def test_each_device_gets_its_share_and_no_more(saved, monkeypatch, after, has_state):
    """The arrays come from the files to where they stay: no device, and no host, has the whole of one between."""
    loaded = []
    plain = Store.load_state

    def load(self, step, target):
        loaded.append(plain(self, step, target))
        return loaded[-1]

    monkeypatch.setattr(Store, "load_state", load)
    made = trainer(after)
    if has_state:
        made.init({**arrays(16), "id": np.arange(16)})
    made.restore(saved("fsdp 8")[0])
    (named,) = loaded
    parts = {"fsdp 8": 8, "fsdp 4, tensor 2": 8, "fsdp 2": 2, "jit 2": 1}[after]
    kernel = named["params/Dense_0/kernel"]  # [8, 16]
    assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // parts}
    state = dict(named_leaves(made.state))
    for name, leaf in named.items():
        assert isinstance(leaf, jax.Array)
        assert state[name].sharding == leaf.sharding
    for name in ("opt_state/0/trace/Dense_0/kernel", "hooks/ema/params/Dense_0/kernel"):
        assert state[name].sharding == kernel.sharding
