"""A further fit goes on where the last ended, whatever the source; a resumed one from where it stood, or not at all."""

import itertools

import numpy as np
import optax
import pytest

import trainkit as tk
from tests.helpers.runs import dies_at, saving, sigterm_at
from tests.helpers.weight import Weight, WeightTrainer, numbers, trainer, weight
from trainkit.data import Arrays, take

TEN = list(range(1, 11))


def told(loader, made=None, **options):
    """Returns the numbers that a further fit trains on, as the loss tells them."""
    log = tk.callbacks.LogMetrics(every=tk.Every(steps=1))
    made = made or trainer(log)
    return made, [value for _, value in made.fit(loader, **options).history["train/loss"]]


def endless():
    return (np.full(4, number, np.float32) for number in itertools.count(1))


class Reshuffles:
    """Another order at each `iter`."""

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def __iter__(self):
        return iter(numbers(*self.rng.permutation(TEN)))


class Stands:
    """A loader that knows where it stands, as torchdata's StatefulDataLoader does; remembers what was read of it."""

    def __init__(self, count=10):
        self.count, self.epoch, self.at, self.read = count, 0, 0, []

    def __iter__(self):
        order = np.random.default_rng(self.epoch).permutation(self.count) + 1
        while self.at < self.count:
            self.at += 1
            self.read.append(int(order[self.at - 1]))
            yield np.full(4, order[self.at - 1], np.float32)
        self.epoch, self.at = self.epoch + 1, 0

    def state_dict(self):
        return {"epoch": self.epoch, "at": self.at, "raw": b"\x00\xff", 7: [np.int64(self.at)]}

    def load_state_dict(self, state):
        assert state["raw"] == b"\x00\xff"
        assert state[7] == [state["at"]]
        self.epoch, self.at = state["epoch"], state["at"]


class StandsInIterators:
    """As Grain's datasets: the iterators know it."""

    class _Iterator:
        def __init__(self, owner):
            self.owner, self.at = owner, 0

        def __iter__(self):
            return self

        def __next__(self):
            if self.at == 10:
                raise StopIteration
            self.at += 1
            self.owner.read.append(self.at)
            return np.full(4, self.at, np.float32)

        def get_state(self):
            return {"at": self.at}

        def set_state(self, state):
            self.at = state["at"]

    def __init__(self):
        self.read = []

    def __iter__(self):
        return self._Iterator(self)


@pytest.mark.parametrize("options", [{}, {"steps_per_call": 3}], ids=repr)
def test_one_generator_given_to_several_fits_goes_on_with_its_next_batch(options):
    made, data = trainer(tk.callbacks.LogMetrics(every=tk.Every(steps=1)), **options), endless()
    for steps in (1, 1, 3, 1):
        result = made.fit(data, steps=steps)
    assert [value for _, value in result.history["train/loss"]] == [1, 2, 3, 4, 5, 6]


def test_accumulated_batches_read_ahead_are_not_lost():
    log, data = tk.callbacks.LogMetrics(every=tk.Every(steps=1)), endless()
    made = WeightTrainer(Weight(), optax.sgd(1.0), callbacks=[log], accumulate=2)
    for _ in range(3):
        result = made.fit(data, steps=1)
    assert [value for _, value in result.history["train/loss"]] == [1.5, 3.5, 5.5]


def test_a_generator_goes_on_also_where_other_data_came_between():
    data = endless()
    made, _ = told(data, steps=2)
    made.fit(numbers(0), steps=1)
    assert told(data, made, steps=2)[1] == [1, 2, 0, 3, 4]


def test_a_generator_that_is_used_up_says_so_in_a_further_fit():
    data = iter(numbers(1, 2))
    made, seen = told(data, epochs=1)
    assert seen == [1, 2]
    with pytest.raises(ValueError, match="can be passed over once, and epoch 1 needs it again"):
        made.fit(data, epochs=1)


def test_a_loader_that_reshuffles_gives_each_row_once_a_pass_over_several_fits():
    data = Reshuffles()
    made, _ = told(data, steps=3)
    _, seen = told(data, made, steps=7)
    assert sorted(seen) == TEN
    _, seen = told(data, made, epochs=1)
    assert sorted(seen[10:]) == TEN


def test_a_fit_that_raised_in_a_hook_goes_on_behind_the_steps_done():
    data, dies = Reshuffles(), dies_at(4)
    log = tk.callbacks.LogMetrics(every=tk.Every(steps=1))
    made = trainer(log, dies)
    with pytest.raises(ConnectionError):
        made.fit(data, epochs=1)
    result = made.fit(data, steps=6)
    assert sorted(value for _, value in result.history["train/loss"]) == TEN


@pytest.mark.parametrize("every", [1, 3, 100])
@pytest.mark.parametrize("died_at", [4, 7, 10, 13])
def test_a_loader_that_knows_its_position_is_set_back_and_not_read_again(tmp_path, every, died_at):
    whole = Stands()
    expected = [int(batch[0]) for _ in range(2) for batch in whole]
    save = tk.Every(steps=every)
    if every == 100:  # a signal comes where nothing was due
        first = saving(tmp_path, sigterm_at(died_at), every=save)
        assert first.fit(Stands(), epochs=2, resume=True).stopped_by == "SIGTERM"
        saved = died_at
    else:
        with pytest.raises(ConnectionError):
            saving(tmp_path, dies_at(died_at), every=save).fit(Stands(), epochs=2, resume=True)
        saved = (died_at - 1) // every * every if every > 1 else died_at - 1
    data, made = Stands(), saving(tmp_path, every=save)
    result = made.fit(data, epochs=2, resume=True)
    assert weight(result.state) == pytest.approx(-sum(expected))
    assert data.read == expected[saved:]


@pytest.mark.parametrize("died_at", [4, 7, 13])
def test_iterators_that_know_their_position_are_set_back(tmp_path, died_at):
    save = tk.Every(steps=2)
    with pytest.raises(ConnectionError):
        saving(tmp_path, dies_at(died_at), every=save).fit(StandsInIterators(), epochs=2, resume=True)
    data = StandsInIterators()
    result = saving(tmp_path, every=save).fit(data, epochs=2, resume=True)
    saved = (died_at - 1) // 2 * 2
    assert data.read == (TEN + TEN)[saved:]
    assert weight(result.state) == -2 * sum(TEN)


def test_a_grain_dataset_is_set_back(tmp_path):
    grain = pytest.importorskip("grain")

    def data():
        read = grain.ReadOptions(num_threads=0)
        mapped = grain.MapDataset.range(40).shuffle(seed=3).map(np.float32).to_iter_dataset(read)
        return mapped.batch(4)

    save = tk.Every(steps=2)
    whole = saving(tmp_path / "whole", every=save).fit(data(), epochs=2)
    with pytest.raises(ConnectionError):
        saving(tmp_path / "run", dies_at(6), every=save).fit(data(), epochs=2, resume=True)
    result = saving(tmp_path / "run", every=save).fit(data(), epochs=2, resume=True)
    assert weight(result.state) == weight(whole.state)


@pytest.mark.parametrize(
    "changed",
    [{"batch_size": 2}, {"batch_size": 8}, {"seed": 1}, {"shuffle": False}],
    ids=repr,
)
def test_a_batch_size_or_an_order_changed_inside_a_pass_is_refused(tmp_path, changed):
    def data(**options):
        values = np.arange(40, dtype=np.float32)
        return Arrays(values, **{"batch_size": 4, "shuffle": True, **options})

    every = tk.Every(steps=3)
    with pytest.raises(ConnectionError):
        saving(tmp_path, dies_at(5), every=every).fit(data(), epochs=2, resume=True)
    name = next(iter(changed))
    with pytest.raises(ValueError, match=f"saved inside a pass over other data .*{name} "):
        saving(tmp_path, every=every).fit(data(**changed), epochs=2, resume=True)
    assert saving(tmp_path, every=every).fit(data(), epochs=2, resume=True).step == 20


def test_between_two_passes_the_batch_size_may_change(tmp_path):
    values = np.arange(40, dtype=np.float32)
    every = tk.Every(epochs=1)
    saving(tmp_path, every=every).fit(Arrays(values, 4), epochs=1, resume=True)
    result = saving(tmp_path, every=every).fit(Arrays(values, 8), epochs=2, resume=True)
    assert result.step == 10 + 5


def test_data_of_another_size_inside_a_pass_are_refused_also_after_restore(tmp_path):
    with pytest.raises(ConnectionError):
        saving(tmp_path, dies_at(5), every=tk.Every(steps=3)).fit(numbers(*TEN), epochs=2)
    made = trainer()
    made.restore(tmp_path)
    with pytest.raises(ValueError, match="steps_per_epoch 10 -> 9"):
        made.fit(numbers(*TEN[:9]), epochs=1)


def test_take_cuts_an_endless_source():
    data = take(lambda: endless(), 3)
    assert told(data, epochs=2)[1] == [1, 2, 3, 1, 2, 3]
    made, _ = told(data, steps=2)
    assert told(data, made, steps=2)[1] == [1, 2, 3, 1]


def test_take_seeks_where_the_source_does_and_knows_its_length():
    data = take(numbers(*TEN), 4)
    assert (data.steps_per_epoch, data.batch_size, data.num_examples, data.seekable) == (4, 4, None, True)
    tk.testing.check_source(lambda: take(numbers(*TEN), 4))
    whole = take(Arrays(np.arange(8.0), 4), 9)
    assert (whole.steps_per_epoch, whole.num_examples) == (2, 8)


@pytest.mark.parametrize(("n", "kind"), [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_take_refuses_what_is_no_number_of_batches(n, kind):
    with pytest.raises(kind, match="take"):
        take(numbers(1), n)


def test_an_endless_source_needs_steps_or_a_cut():
    class Endless(tk.data.Source):
        endless, batch_size, may_be_partial, seekable = True, 4, False, True

        def batches(self, epoch, start=0):
            return (np.full(4, number, np.float32) for number in itertools.count(start))

    with pytest.raises(ValueError, match=r"no end.*tk\.data\.take"):
        trainer().fit(Endless(), epochs=1)
    assert trainer().fit(Endless(), steps=3).step == 3
    with pytest.raises(ValueError, match=r"no end.*tk\.data\.take"):
        trainer().evaluate(Endless())
    assert trainer().fit(take(Endless(), 4), epochs=2).step == 8
