"""Makes the information that a loop gives to callbacks, and a writer that remembers."""

from trainkit._core.history import History
from trainkit.callbacks._info import Info, Plan
from trainkit.writers._null import NullWriter

PLAN = Plan(first_step=0, steps=100, epochs=5, steps_per_epoch=20, eval_names=("eval",))


class Recorder(NullWriter):
    """Remembers scalars as `(step, {name: value})`."""

    def __init__(self):
        self.rows = []

    def write_scalars(self, step, scalars):
        assert all(type(value) is float for value in scalars.values())
        self.rows.append((step, dict(scalars)))


class Lazy(dict):
    """A mapping that counts how often it was looked into."""

    looks = 0

    def __getitem__(self, name):
        self.looks += 1
        return super().__getitem__(name)

    def __iter__(self):
        self.looks += 1
        return super().__iter__()

    def __len__(self):
        self.looks += 1
        return super().__len__()

    def keys(self):
        self.looks += 1
        return super().keys()

    def items(self):
        self.looks += 1
        return super().items()


def make_info(step=0, metrics=None, *, epoch=1, state=None, writer=None, plan=PLAN, directions=None):
    """Returns an `Info` of that step with those metrics."""
    return Info(
        step=step,
        epoch=epoch,
        state=lambda: state,
        metrics=lambda: {} if metrics is None else metrics,
        history=History(),
        logdir=None,
        writer=writer or NullWriter(),
        plan=plan,
        seconds=0.0,
        direction=(directions or {}).get,
    )


def evaluations(callback, values, *, name="eval/loss", first=1, state=None):
    """Gives `callback` one evaluation a value, 10 steps apart, and returns what it returned, up to a stop."""
    returned = []
    for number, value in enumerate(values, first):
        returned.append(callback.on_eval_end(make_info(10 * number, {name: value}, state=state)))
    return returned
