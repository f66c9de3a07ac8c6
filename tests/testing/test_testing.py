"""The conformance checks pass for what trainkit has, and name the promise that a broken one breaks."""

import ast
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainkit as tk
from trainkit.testing import check_callback, check_source, check_strategy, check_writer

# Strategies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tk.parallel.Mesh, tk.parallel.PerExample, tk.parallel.Pmap])
def test_our_strategies(make, one_device):
    check_strategy(make(devices=[one_device]))


class Broken(tk.parallel.Strategy):
    """A strategy on one device, whose methods tests replace one at a time."""

    shards = 4
    in_flight = None
    replica_axis = None

    def __init__(self):
        self._inner = tk.parallel.Mesh(devices=jax.devices()[:1])

    def example(self, batch):
        return batch

    def map_forward(self, forward):
        return self._inner.map_forward(forward)

    def merge_collections(self, updated):
        return updated

    def compile(self, fn, *, inputs, outputs, donate=()):
        return jax.jit(fn, donate_argnums=donate)

    def place(self, batch):
        return batch

    def replicate(self, tree):
        return jax.device_put(tree)

    def lay_out(self, state):
        return jax.device_put(state)

    def describe(self):
        return "one device"


class NoAxis(Broken):
    def map_forward(self, forward):
        return forward


class ForgetsStatistics(Broken):
    def merge_collections(self, updated):
        return jax.tree.map(jnp.zeros_like, updated)


class DoublesGradients(Broken):
    def sum(self, tree):
        return jax.tree.map(lambda leaf: 2 * leaf, tree)


class LosesRows(Broken):
    def place(self, batch):
        return jax.tree.map(lambda leaf: np.concatenate([leaf[:1], leaf[:-1]]), batch)


class Recompiles(Broken):
    def compile(self, fn, *, inputs, outputs, donate=()):
        return lambda *args: jax.jit(lambda *inner: fn(*inner))(*args)


class EvaluatesTwice(Broken):
    def place(self, batch):
        # One mask more than there are examples, where a mask has room.
        is_mask = isinstance(batch, np.ndarray) and batch.dtype == bool
        return np.ones_like(batch) if is_mask else batch


def test_a_strategy_of_ones_own():
    check_strategy(Broken())


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (NoAxis, "trains a model.*batch"),
        (ForgetsStatistics, "the batch statistics after training"),
        (DoublesGradients, "the losses of training|the parameters after training"),
        (LosesRows, "the losses of training"),
        (Recompiles, "nothing compiles after the first step"),
        (EvaluatesTwice, "the losses of training|trains a model"),
    ],
)
def test_broken_strategies(broken, message):
    with pytest.raises(AssertionError, match=f"broken promise.*({message})"):
        check_strategy(broken())


# Callbacks --------------------------------------------------------------------------------------------------


class Counter(tk.callbacks.Callback):
    def __init__(self):
        self.seen = 0

    def on_step(self, info):
        self.seen += 1

    def state_dict(self):
        return {"seen": self.seen, "losses": np.arange(3.0)}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class LoadsNothing(Counter):
    def load_state_dict(self, state):
        pass


class LoadsWrongKey(Counter):
    def load_state_dict(self, state):
        self.seen = state["steps"]


class KeepsAnObject(Counter):
    def state_dict(self):
        return {"seen": self}


class ServesOnce(Counter):
    def __init__(self):
        super().__init__()
        self.closed = False

    def on_fit_start(self, info):
        if self.closed:
            raise RuntimeError("closed for good")

    def close(self):
        self.closed = True


class ClosesWhatItNeverOpened(Counter):
    def on_step(self, info):
        self.opened = True

    def close(self):
        del self.opened


class ReturnsNone(Counter):
    def state_dict(self):
        return None


class NamesDiffer(Counter):
    made = 0

    def __init__(self):
        super().__init__()
        NamesDiffer.made += 1
        self.name = f"hook{NamesDiffer.made}"

    def step_hook(self):
        return tk.hooks.StepHook(self.name, lambda state: jnp.zeros(()), lambda memory, values: memory)


def test_a_callback_of_ones_own():
    check_callback(Counter)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (LoadsNothing, "a new callback that loaded a state_dict returns the same: seen is 0"),
        (LoadsWrongKey, "load_state_dict takes what state_dict returned.*KeyError"),
        (KeepsAnObject, "state_dict holds JSON values and arrays"),
        (ReturnsNone, "state_dict returns a dict: NoneType"),
        (ServesOnce, "serves a second fit.*closed for good"),
        (ClosesWhatItNeverOpened, "close works when nothing but on_fit_start was called"),
        (NamesDiffer, "step_hook names one place"),
        (dict, "make\\(\\) returns a Callback: dict"),
    ],
)
def test_broken_callbacks(make, message):
    with pytest.raises(AssertionError, match=f"broken promise: .*{message}"):
        check_callback(make)


# Writers ----------------------------------------------------------------------------------------------------

WRITERS = {
    "null": lambda folder: tk.writers.NullWriter(),
    "tensorboard": lambda folder: tk.writers.TensorBoardWriter(folder),
    "jsonl": lambda folder: tk.writers.JsonlWriter(folder),
    "multi": lambda folder: tk.writers.MultiWriter(tk.writers.NullWriter(), tk.writers.JsonlWriter(folder)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_our_writers(name, tmp_path):
    folders = (tmp_path / str(number) for number in range(9))
    check_writer(lambda: WRITERS[name](next(folders)))


class Values(tk.writers.NullWriter):
    """Keeps scalars, and does no sounds."""

    def __init__(self):
        self.lines, self.closed = [], False

    def write_scalars(self, step, scalars):
        if self.closed:
            raise ValueError("I/O operation on closed file")
        self.lines += [
            json.dumps([int(step), name, np.asarray(value).item()]) for name, value in scalars.items()
        ]

    def write_audios(self, step, audios, *, sample_rate):
        raise NotImplementedError

    def close(self):
        self.closed = True


class NoKeyword(Values):
    def write_histograms(self, step, arrays):
        pass


class ClosesOnce(Values):
    def close(self):
        if self.closed:
            raise ValueError("already closed")
        self.closed = True


class RefusesArrays(Values):
    def write_scalars(self, step, scalars):
        json.dumps(scalars)


class ReturnsSomething(Values):
    def flush(self):
        return True


class NoScalars(Values):
    def write_scalars(self, step, scalars):
        raise NotImplementedError


class ClosesWithTheFit(Values):
    def flush(self):
        self.closed = True


def test_a_writer_of_ones_own():
    check_writer(Values)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (NoKeyword, "write_histograms takes .*num_buckets"),
        (ClosesOnce, "close may be called twice.*already closed"),
        (RefusesArrays, "write_scalars takes"),
        (ReturnsSomething, "flush returns nothing: True"),
        (NoScalars, "write_scalars takes .*NotImplementedError"),
        (ClosesWithTheFit, "flush may be called between writes"),
    ],
)
def test_broken_writers(make, message):
    with pytest.raises(AssertionError, match=f"broken promise: {message}"):
        check_writer(make)


# Sources ----------------------------------------------------------------------------------------------------


def arrays(rows=10):
    return {"x": np.arange(rows, dtype=np.float32), "y": np.arange(rows)}


class Loader:
    def __iter__(self):
        return iter([arrays(3), arrays(3)])


SOURCES = {
    "Arrays": lambda: tk.data.Arrays(arrays(), batch_size=4),
    "shuffled": lambda: tk.data.Arrays(arrays(), batch_size=4, shuffle=True, drop_last=False),
    "list": lambda: [arrays(4), arrays(4), arrays(2)],
    "function": lambda: lambda epoch: iter([arrays(4), arrays(4 - epoch)]),
    "re-iterable": lambda: Loader(),
}


@pytest.mark.parametrize("name", SOURCES)
def test_our_sources(name):
    check_source(SOURCES[name])


class Numbers(tk.data.Source):
    """Ten numbers in batches of four, in an order that the epoch decides."""

    steps_per_epoch, num_examples, batch_size = 3, 10, 4
    may_be_partial, seekable = True, True

    def batches(self, epoch, start=0):
        self.check_position(epoch, start)
        order = np.random.default_rng(epoch).permutation(10)
        return (self.batch(order, index) for index in range(start, 3))

    def batch(self, order, index):
        return {"x": order[4 * index : 4 * index + 4].astype(np.float32)}


class SeeksWrong(Numbers):
    def batches(self, epoch, start=0):
        self.check_position(epoch, start)
        order = np.random.default_rng([epoch, start]).permutation(10)
        return (self.batch(order, index) for index in range(start, 3))


class SaysFull(Numbers):
    may_be_partial = False


class Miscounts(Numbers):
    num_examples = 12


class Missteps(Numbers):
    steps_per_epoch = 4


class WrongSize(Numbers):
    batch_size = 5


class SmallFirst(Numbers):
    batch_size = None

    def batch(self, order, index):
        return super().batch(order, 2 - index)


class ChangesDtype(Numbers):
    def batch(self, order, index):
        found = super().batch(order, index)
        return {"x": found["x"].astype(np.int32)} if index == 1 else found


class Forgets(Numbers):
    """Shuffles from one generator, as a loader does that cannot be asked again."""

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def batches(self, epoch, start=0):
        self.check_position(epoch, start)
        order = self.rng.permutation(10)
        return (self.batch(order, index) for index in range(start, 3))


class SharesItsPosition(Numbers):
    def batches(self, epoch, start=0):
        self.check_position(epoch, start)
        self.position = start
        order = np.random.default_rng(epoch).permutation(10)

        def read():
            while self.position < 3:
                self.position += 1
                yield self.batch(order, self.position - 1)

        return read()


class TakesAnything(Numbers):
    def batches(self, epoch, start=0):
        order = np.random.default_rng(abs(epoch)).permutation(10)
        return (self.batch(order, index) for index in range(max(start, 0), 3))


class Uneven(Numbers):
    def batch(self, order, index):
        return {**super().batch(order, index), "y": np.zeros(3)}


class Empty(Numbers):
    steps_per_epoch = num_examples = None

    def batches(self, epoch, start=0):
        return iter(())


def test_a_source_of_ones_own():
    check_source(Numbers)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (SeeksWrong, r"batches\(0, start=1\) goes on as batches\(0\)"),
        (SaysFull, r"may_be_partial=False.*\[4, 4, 2\]"),
        (Miscounts, "num_examples=12 is how many there are: 10"),
        (Missteps, "steps_per_epoch=4 is how many there are: 3"),
        (WrongSize, "batch_size=5 rows: 4"),
        (SmallFirst, r"first batch is the largest.*\[2, 4, 4\]"),
        (ChangesDtype, "same leaves and dtypes: batch 1: x: float32 -> int32"),
        (Forgets, r"goes on as batches\(0\)|yields the same epoch"),
        (SharesItsPosition, "do not disturb each other"),
        (TakesAnything, r"batches\(-1, 0\) is refused"),
        (Uneven, "equal leading sizes"),
        (Empty, "at least one batch"),
    ],
)
def test_broken_sources(make, message):
    with pytest.raises(AssertionError, match=f"broken promise: .*({message})"):
        check_source(make)


def test_no_test_runner_is_needed():
    imported = set()
    for path in pathlib.Path(tk.testing.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module)
            elif isinstance(node, ast.Import):
                imported |= {name.name for name in node.names}
    assert "trainkit._trainer.trainer" in imported
    assert "pytest" not in {name.partition(".")[0] for name in imported}
