"""A callback that notes the calls of its hooks, and what such notes are compared with."""

import trainkit as tk
from trainkit.callbacks import Callback
from trainkit.callbacks._callback import Phase


class Recorder(Callback):
    """Notes every call as `name hook step epoch` in a list that several may share, then does what it is told.

    Args:
        log: the list.
        name: of this callback.
        acts: functions of the info by hook, without `on_`; what they return, the hook returns.
        phase: place in the order.
        every: cadence of `on_step`.
    """

    def __init__(self, log=None, name="", *, phase=Phase.WRITE, every=tk.Every(steps=1), **acts):  # noqa: B008
        self.log = [] if log is None else log
        self.name, self.phase, self.every, self.acts = name, phase, every, acts

    def _note(self, hook, *info):
        where = [str(number) for i in info for number in (i.step, i.epoch)]
        self.log.append(" ".join([*([self.name] if self.name else []), hook, *where]))
        return self.acts[hook](*info) if hook in self.acts else None

    def on_fit_start(self, info):
        return self._note("fit_start", info)

    def on_epoch_start(self, info):
        return self._note("epoch_start", info)

    def on_step(self, info):
        return self._note("step", info)

    def on_eval_start(self, info):
        return self._note("eval_start", info)

    def on_eval_end(self, info):
        return self._note("eval_end", info)

    def on_epoch_end(self, info):
        return self._note("epoch_end", info)

    def on_fit_end(self, info):
        return self._note("fit_end", info)

    def on_exception(self, info, exc):
        self._note("exception", info)

    def close(self):
        self._note("close")


def lines(text):
    return [line.strip() for line in text.strip().splitlines()]


def calls(log, hook):
    """The callers of `hook` in order, where each was made by a named callback."""
    return [line.split()[0] for line in log if line.split()[1] == hook]
