"""`as_source` on every kind of data it takes, and on what it refuses."""

import itertools
import logging
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from trainkit.data import Arrays, Source, as_source


def make(index, rows=2):
    return {"x": np.full(rows, index)}


def seen(iterator):
    return [int(batch["x"][0]) for batch in iterator]


class Loader:
    """A re-iterable of three batches that differ between passes, with no length."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return iter([make(10 * self.passes + index) for index in range(3)])


class TorchTensor:
    """Has the methods of `torch.Tensor` that are called, and their order matters as it does there."""

    def __init__(self, array, attached=True):
        self.array, self.attached = array, attached
        self.shape, self.dtype = array.shape, f"torch.{array.dtype}"

    def detach(self):
        return TorchTensor(self.array, attached=False)

    def cpu(self):
        return self

    def numpy(self):
        assert not self.attached
        return self.array


class Sampler:
    def __init__(self):
        self.epochs = []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


class TorchLoader:
    def __init__(self, sampler=None, drop_last=False, length=3):
        self.dataset, self.batch_size = [], 2
        self.drop_last, self.sampler, self.length = drop_last, sampler, length

    def __len__(self):
        if self.length is None:
            raise TypeError("an iterable-style dataset has no length")
        return self.length

    def __iter__(self):
        for index in range(3):
            yield [TorchTensor(np.full((2, 1), index, np.float32)), {"y": TorchTensor(np.arange(2))}]


class TfTensor:
    def __init__(self, array):
        self.array = array

    def numpy(self):
        return self.array

    def __int__(self):
        return int(self.array)


class TfDataset:
    def __init__(self, cardinality):
        self._cardinality = cardinality

    def cardinality(self):
        return TfTensor(np.int64(self._cardinality))

    def as_numpy_iterator(self):
        raise AssertionError("not needed")

    def __iter__(self):
        return iter([{"x": TfTensor(np.full(2, index))} for index in range(3)])


class GrainMap:
    """Like `grain.MapDataset`: indices beyond the length are the next pass."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return None if index == 13 else make(index)

    def __iter__(self):
        raise AssertionError("starts threads in Grain")

    def to_iter_dataset(self):
        raise AssertionError("not needed")


def test_a_source_is_returned_itself():
    source = Arrays({"x": np.arange(4)}, 2)
    assert as_source(source) is source


def test_a_source_of_ones_own_needs_only_batches():
    class Own(Source):
        def batches(self, epoch, start=0):
            return iter([make(0)])

    source = as_source(Own())
    assert source.steps_per_epoch is source.num_examples is source.batch_size is None
    assert source.may_be_partial
    assert not source.seekable
    with pytest.raises(TypeError, match="abstract"):
        Source()


def test_a_list_is_passed_over_again_and_seeks():
    source = as_source([make(0), make(1), make(2, rows=1)])
    for epoch, start in itertools.product(range(2), range(4)):
        assert seen(source.batches(epoch, start)) == [0, 1, 2][start:]
    assert (source.steps_per_epoch, source.num_examples, source.batch_size) == (3, 5, 2)
    assert source.may_be_partial
    assert source.seekable
    assert not as_source([make(0), make(1)]).may_be_partial


def test_a_list_changed_later_changes_nothing():
    batches = [make(0), make(1)]
    source = as_source(batches)
    batches.clear()
    assert seen(source.batches(0)) == [0, 1]


def test_a_tuple_of_batches_and_a_list_of_arrays():
    assert seen(as_source((make(0), make(1))).batches(0)) == [0, 1]
    source = as_source([np.zeros((2, 3)), np.ones((2, 3))])
    assert [batch[0, 0] for batch in source.batches(0)] == [0, 1]


@pytest.mark.parametrize(
    ("batches", "kind", "message"),
    [
        ([], ValueError, "empty list"),
        ([make(0), {"x": np.zeros(2), "y": np.zeros(3)}], ValueError, r"Batch 1 of the list: .*`y` \[3\]"),
        ([make(0), {"x": np.array(["a"])}], TypeError, "Batch 1 of the list: Leaf `x`"),
        (["a"], TypeError, "Batch 0 of the list"),
        ([[1, 2], [3, 4]], ValueError, "Batch 0 of the list: .*no leaf"),
    ],
)
def test_lists_that_are_not_batches(batches, kind, message):
    with pytest.raises(kind, match=message):
        as_source(batches)


def test_a_re_iterable_is_opened_for_every_epoch():
    loader = Loader()
    source = as_source(loader)
    assert loader.passes == 0
    assert seen(source.batches(0)) == [10, 11, 12]
    assert seen(source.batches(1)) == [20, 21, 22]
    assert source.steps_per_epoch is None
    assert not source.seekable


def test_a_function_is_called_for_every_epoch():
    assert seen(as_source(lambda: iter([make(7)])).batches(3)) == [7]
    assert seen(as_source(lambda epoch: [make(epoch)]).batches(3)) == [3]
    assert seen(as_source(lambda number: [make(number)]).batches(3)) == [3]
    assert seen(as_source(lambda index=5: [make(index)]).batches(3)) == [5]
    assert seen(as_source(lambda *, size=1, epoch=0: [make(epoch)] * size).batches(3)) == [3]


def test_a_generator_function_is_a_function():
    def generate():
        yield make(1)
        yield make(2)

    source = as_source(generate)
    assert seen(source.batches(0)) == seen(source.batches(1)) == [1, 2]


def test_functions_that_do_not_fit():
    # `dict` is a callable without a signature, and an empty one is no iterator of batches.
    with pytest.raises(TypeError, match="A dict was given"):
        next(as_source(dict).batches(0))
    with pytest.raises(TypeError, match=r"requires the arguments \['a', 'b'\]"):
        as_source(lambda a, b: None)
    with pytest.raises(TypeError, match="returned a NoneType"):
        next(as_source(lambda: None).batches(0))
    with pytest.raises(TypeError, match="one batch"):
        next(as_source(lambda: make(0)).batches(0))


def test_an_iterator_serves_one_epoch():
    source = as_source(make(index) for index in range(3))
    # Asking without reading does not use it up, and the epoch of a continued run need not be 0.
    source.batches(4)
    assert seen(source.batches(4)) == [0, 1, 2]
    with pytest.raises(
        ValueError, match="generator, which can be passed over once, and epoch 5 needs it again"
    ):
        next(source.batches(5))


@pytest.mark.parametrize("data", [iter(()), lambda: iter(()), set()])
def test_a_source_that_yields_nothing(data):
    with pytest.raises(ValueError, match="yielded no batch in epoch 2"):
        next(as_source(data).batches(2))


def test_nothing_left_at_the_end_of_an_epoch_is_no_error():
    assert seen(as_source(lambda: [make(0), make(1)]).batches(0, start=2)) == []


def test_a_replay_equals_iterating_from_every_position():
    source = as_source(lambda epoch: (make(10 * epoch + index) for index in range(4)))
    for start in range(5):
        assert seen(source.batches(1, start)) == [10, 11, 12, 13][start:]


def test_a_replay_is_announced_once_with_its_duration(caplog):
    ticks = iter([100.0, 102.5, 200.0, 201.0])
    source = as_source(Loader(), clock=lambda: next(ticks))
    with caplog.at_level(logging.WARNING, logger="trainkit"):
        assert seen(source.batches(0)) == [10, 11, 12]
        assert not caplog.records
        assert seen(source.batches(1, start=2)) == [22]
        assert seen(source.batches(2, start=1)) == [31, 32]
    (record,) = caplog.records
    assert "Loader" in record.getMessage()
    assert "first 2 batches took 2.5 s" in record.getMessage()


def test_a_replay_beyond_the_end():
    with pytest.raises(ValueError, match="ended after 3 batches, before batch 4"):
        next(as_source(Loader()).batches(0, start=4))


def test_skipped_batches_are_not_converted():
    class Costly:
        def numpy(self):
            raise AssertionError("converted")

    def data():
        return iter([{"x": Costly()}, make(1)])

    assert seen(as_source(data).batches(0, start=1)) == [1]


def test_torch_loader():
    sampler = Sampler()
    source = as_source(TorchLoader(sampler))
    for epoch in (0, 3):
        batches = list(source.batches(epoch))
        assert [batch[0][0, 0] for batch in batches] == [0, 1, 2]
        assert type(batches[0][0]) is type(batches[0][1]["y"]) is np.ndarray
    assert sampler.epochs == [0, 3]
    assert (source.steps_per_epoch, source.batch_size, source.may_be_partial) == (3, 2, True)
    assert source.num_examples is None


def test_torch_loader_that_drops_its_tail_and_has_no_length():
    source = as_source(TorchLoader(drop_last=True, length=None))
    assert source.steps_per_epoch is None
    assert not source.may_be_partial
    assert len(list(source.batches(0))) == 3


@pytest.mark.parametrize(("cardinality", "steps"), [(3, 3), (-1, None), (-2, None)])
def test_tf_dataset(cardinality, steps):
    source = as_source(TfDataset(cardinality))
    assert source.steps_per_epoch == steps
    batches = list(source.batches(0))
    assert seen(batches) == [0, 1, 2]
    assert type(batches[0]["x"]) is np.ndarray


def test_tensors_from_a_function_are_converted_and_own_arrays_left():
    device = jnp.zeros(2)
    (batch,) = as_source(lambda: [(TfTensor(np.ones(2)), device, 1.5)]).batches(0)
    np.testing.assert_array_equal(batch[0], np.ones(2), strict=True)
    assert batch[1] is device
    assert batch[2] == 1.5


def test_a_grain_map_is_indexed_pass_after_pass():
    source = as_source(GrainMap(3))
    assert seen(source.batches(0)) == [0, 1, 2]
    assert seen(source.batches(2, start=1)) == [7, 8]
    assert source.steps_per_epoch == 3
    assert source.seekable


def test_an_endless_grain_map():
    source = as_source(GrainMap(sys.maxsize))
    assert source.steps_per_epoch is None
    assert seen(itertools.islice(source.batches(0, start=5), 3)) == [5, 6, 7]


def test_grain_maps_that_do_not_fit():
    with pytest.raises(ValueError, match="empty Grain"):
        as_source(GrainMap(0))
    with pytest.raises(ValueError, match="no element 13"):
        list(as_source(GrainMap(20)).batches(0))


@pytest.mark.parametrize(
    "data",
    [
        make(0),
        np.zeros(3),
        jnp.zeros(3),
        (np.zeros(3), np.zeros(3)),
        (TorchTensor(np.zeros(3)), 1),
        "path",
        b"path",
    ],
)
def test_a_single_batch_says_how_to_wrap_it(data):
    with pytest.raises(TypeError, match=r"\[batch\] for one batch, tk\.data\.Arrays"):
        as_source(data)


@pytest.mark.parametrize("data", [3, None, object()])
def test_other_things_are_refused_with_what_is_accepted(data):
    with pytest.raises(
        TypeError, match=f"A {type(data).__name__} is not a source of batches.*tf.data.Dataset"
    ):
        as_source(data)


@pytest.mark.parametrize("data", [[make(0)], Loader(), GrainMap(3), TfDataset(3)])
def test_positions_that_do_not_exist(data):
    source = as_source(data)
    for epoch, start in [(-1, 0), (0, -1)]:
        with pytest.raises(ValueError, match="count from 0"):
            source.batches(epoch, start)
    if source.steps_per_epoch is not None:
        with pytest.raises(ValueError, match="beyond"):
            source.batches(0, source.steps_per_epoch + 1)
