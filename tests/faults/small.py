"""A run whose every number is known, for faults within one process. Owns the run; the tests do the damage."""

import numpy as np

import trainkit as tk
from tests.helpers.runs import scalars_of
from tests.helpers.weight import numbers, trainer, weight

STEPS = 12


def make(logdir, *extra, **options):
    """Returns a trainer that saves every second step and keeps three; `extra` callbacks come first."""
    callbacks = [
        *extra,
        tk.callbacks.LogMetrics(every=tk.Every(steps=3)),
        tk.callbacks.EarlyStopping("eval/loss", mode="min", patience=30),
        tk.callbacks.Checkpoint(tk.Every(steps=2), keep=3),
    ]
    return trainer(*callbacks, logdir=logdir, **options)


def arrays():
    """Returns rows of which batch n holds n."""
    return np.repeat(np.arange(1, STEPS + 1, dtype=np.float32), 4)


def fit(made, data=None):
    """Trains one pass, from wherever an earlier run came to; the loss at step n is n."""
    source = tk.data.Arrays(arrays(), 4) if data is None else data
    return made.fit(source, epochs=1, eval_data=numbers(7), eval_every=tk.Every(steps=5), resume=True)


def check_whole(logdir, result):
    """Fails unless the run ended as one that nothing happened to."""
    assert (result.step, result.epoch, result.stopped_by) == (STEPS, 1, None)
    assert weight(result.state) == -sum(range(1, STEPS + 1))
    rows = {(end, "train/loss"): np.mean([end - 2, end - 1, end]) for end in range(3, STEPS + 1, 3)}
    rows |= {(step, "eval/loss"): 7.0 for step in (5, 10)}
    charts = dict(rows)  # TensorBoard shows no epoch
    rows |= {(end, "epoch"): 1 for end in range(3, STEPS + 1, 3)}
    kept = {(step, name): value for name, pairs in result.history.items() for step, value in pairs}
    assert kept == rows
    assert scalars_of(logdir) == (rows, charts)


def steps(logdir):
    """Returns the steps of the whole checkpoints in `logdir`."""
    return [info.step for info in tk.checkpoint.verify(logdir) if not info.problems]


class Raises(tk.callbacks.Callback):
    """Raises at the n-th call of one of its hooks."""

    def __init__(self, hook, call=1, error=RuntimeError):
        self._hook, self._left, self._error = hook, call, error

    def _called(self, hook):
        self._left -= hook == self._hook
        if hook == self._hook and not self._left:
            raise self._error(f"broken in {hook}")

    def on_fit_start(self, info):
        self._called("on_fit_start")

    def on_epoch_start(self, info):
        self._called("on_epoch_start")

    def on_step(self, info):
        self._called("on_step")

    def on_eval_start(self, info):
        self._called("on_eval_start")

    def on_eval_end(self, info):
        self._called("on_eval_end")

    def on_epoch_end(self, info):
        self._called("on_epoch_end")

    def on_fit_end(self, info):
        self._called("on_fit_end")

    def on_exception(self, info, exc):
        self._called("on_exception")

    def close(self):
        self._called("close")

    def state_dict(self):
        self._called("state_dict")
        return {}

    def load_state_dict(self, state):
        self._called("load_state_dict")
