"""What the tests of checkpoints share: runs that break off, losses by script, and what a folder holds."""

import json
import os
import signal

import jax
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.weight import numbers, trainer
from trainkit.callbacks import Callback, Checkpoint, Lambda

TEN = numbers(*range(1, 11))


class Script(Callback):
    """An evaluation whose loss at a step is what was written down for it.

    Args:
        losses: by step.
    """

    def __init__(self, losses):
        self.losses, self.step = losses, None

    def on_eval_start(self, info):
        self.step = info.step

    def data(self):
        return iter(numbers(self.losses[self.step]))


def sigterm_at(step, during="on_step"):
    """A callback that sends its process SIGTERM."""

    def act(info):
        if info.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return Lambda(**{during: act})


def dies_at(step):
    """A callback that raises, so that nothing more is saved."""

    def act(info):
        if info.step == step:
            raise ConnectionError("the machine is gone")

    return Lambda(on_step=act)


def saving(logdir, *callbacks, every=None, **options):
    """A trainer that saves into `logdir`; see `tests.helpers.weight.trainer`."""
    return trainer(Checkpoint(**({"every": every} if every else {}), **options), *callbacks, logdir=logdir)


def steps_in(folder):
    """The steps of the checkpoints in a folder by the names in it."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def flip(path, offset=-1):
    """Changes one bit of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


def largest_file(folder):
    """The file that holds most of a checkpoint."""
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def plain(tree):
    """NumPy arrays of the leaves by path; keys as their data."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        found[jax.tree_util.keystr(path)] = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
    return found


def assert_equal(a, b):
    """Bit for bit: names, dtypes, shapes and values."""
    a, b = plain(a), plain(b)
    assert a.keys() == b.keys()
    for name, leaf in a.items():
        assert (leaf.dtype, leaf.shape) == (b[name].dtype, b[name].shape), name
        np.testing.assert_array_equal(leaf, b[name], err_msg=name)


def scalars_of(logdir):
    """Returns the scalars of both logs, `{(step, name): value}`: of the JSONL file, and of TensorBoard's.

    The latter has no `epoch`.
    """
    lines = [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]
    rows = [(line["step"], line["scalars"]) for line in lines if "scalars" in line]
    pairs = [(step, name, value) for step, scalars in rows for name, value in scalars.items()]
    jsonl = {(step, name): value for step, name, value in pairs}
    assert len(jsonl) == len(pairs), "a value stands twice in the JSONL log"
    events = EventAccumulator(str(logdir), size_guidance={"scalars": 0}).Reload()
    board = [(e.step, tag, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]
    tensorboard = {(step, tag): value for step, tag, value in board}
    assert len(tensorboard) == len(board), "a value stands twice in TensorBoard's log"
    return jsonl, tensorboard
