"""`Arrays`: the order of the examples, seeking in it, and what it refuses."""

import ml_dtypes
import numpy as np
import pytest

from trainkit.data import Arrays

SIZE = 23


def rows(batches):
    return np.concatenate([batch["label"] for batch in batches])


def labelled(size=SIZE):
    return {"image": np.arange(size * 6, dtype=np.float32).reshape(size, 2, 3), "label": np.arange(size)}


def drawn(seed, epoch, size):
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    return np.random.Generator(bits).permutation(size)


@pytest.mark.parametrize("batch_size", [1, 4, 23, 40])
def test_unshuffled_is_every_example_in_order(batch_size):
    source = Arrays(labelled(), batch_size)
    np.testing.assert_array_equal(rows(source.batches(0)), np.arange(SIZE))
    np.testing.assert_array_equal(rows(source.batches(5)), np.arange(SIZE))


def test_unshuffled_batches_are_views():
    data = labelled()
    batch = next(Arrays(data, 4).batches(0))
    assert np.shares_memory(batch["image"], data["image"])


@pytest.mark.parametrize("batch_size", [1, 4, 5, 23])
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_shuffled_order_is_that_of_numpy_whatever_the_batch_size(batch_size, epoch):
    source = Arrays(labelled(), batch_size, shuffle=True, seed=3, drop_last=False)
    np.testing.assert_array_equal(rows(source.batches(epoch)), drawn(3, epoch, SIZE))


def test_order_is_pinned():
    # Changing it, here or in NumPy, changes every resumed run.
    source = Arrays({"label": np.arange(8)}, 8, shuffle=True, seed=0)
    assert rows(source.batches(0)).tolist() == [3, 6, 4, 0, 7, 5, 2, 1]


def test_epochs_and_seeds_differ_and_repeat():
    def order(seed, epoch):
        return tuple(rows(Arrays(labelled(), SIZE, shuffle=True, seed=seed).batches(epoch)).tolist())

    orders = {order(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(orders) == 6
    assert order(1, 2) == order(1, 2)


def test_rows_stay_together_across_leaves():
    data = labelled()
    for batch in Arrays(data, 4, shuffle=True).batches(1):
        np.testing.assert_array_equal(batch["image"], data["image"][batch["label"]])


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_seeking_equals_iterating_from_every_position(shuffle, drop_last):
    source = Arrays(labelled(), 4, shuffle=shuffle, drop_last=drop_last)
    for epoch in (0, 1):
        whole = [batch["label"].tolist() for batch in source.batches(epoch)]
        assert len(whole) == len(source)
        for start in range(len(source) + 1):
            assert [batch["label"].tolist() for batch in source.batches(epoch, start)] == whole[start:]


def test_two_epochs_read_at_once_do_not_mix():
    source = Arrays(labelled(), 4, shuffle=True, drop_last=False)
    pairs = list(zip(source.batches(0), source.batches(1), strict=True))
    np.testing.assert_array_equal(rows(first for first, _ in pairs), drawn(0, 0, SIZE))
    np.testing.assert_array_equal(rows(second for _, second in pairs), drawn(0, 1, SIZE))


@pytest.mark.parametrize(
    ("options", "steps", "examples", "partial"),
    [
        ({"batch_size": 4}, 6, 23, True),
        ({"batch_size": 4, "drop_last": True}, 5, 20, False),
        ({"batch_size": 4, "shuffle": True}, 5, 20, False),
        ({"batch_size": 4, "shuffle": True, "drop_last": False}, 6, 23, True),
        ({"batch_size": 23, "shuffle": True}, 1, 23, False),
        ({"batch_size": 100}, 1, 23, True),
    ],
)
def test_what_it_declares_is_what_it_yields(options, steps, examples, partial):
    source = Arrays(labelled(), **options)
    sizes = [len(batch["label"]) for batch in source.batches(0)]
    assert len(source) == source.steps_per_epoch == len(sizes) == steps
    assert source.num_examples == sum(sizes) == examples
    assert source.may_be_partial is partial is any(size < options["batch_size"] for size in sizes)
    assert source.size == SIZE
    assert source.seekable


def test_shuffled_leaves_out_other_examples_each_epoch():
    source = Arrays(labelled(), 4, shuffle=True)
    left_out = {tuple(sorted(set(range(SIZE)) - set(rows(source.batches(epoch))))) for epoch in range(5)}
    assert all(len(examples) == 3 for examples in left_out)
    assert len(left_out) > 1


@pytest.mark.parametrize("shuffle", [False, True])
def test_any_container_of_arrays(shuffle):
    values = np.arange(6)
    nested = Arrays({"a": (values, [values * 2]), "b": values * 3}, 2, shuffle=shuffle)
    for batch in nested.batches(0):
        first, (second,) = batch["a"]
        np.testing.assert_array_equal(second, first * 2)
        np.testing.assert_array_equal(batch["b"], first * 3)
    pair = next(Arrays((values, values), 2, shuffle=shuffle).batches(0))
    assert isinstance(pair, tuple)
    assert next(Arrays(values, 2, shuffle=shuffle).batches(0)).shape == (2,)


def test_a_mapping_of_another_kind_becomes_a_dict():
    class Table(dict):
        pass

    batch = next(Arrays(Table(labelled()), 4).batches(0))
    assert type(batch) is dict
    assert batch["label"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [np.uint8, np.bool_, np.complex64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shuffle", [False, True])
def test_dtypes_are_kept(dtype, shuffle):
    source = Arrays({"x": np.ones((6, 2), dtype)}, 2, shuffle=shuffle)
    assert next(source.batches(0))["x"].dtype == dtype


def test_memory_mapped_arrays_are_not_loaded(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(12.0))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert np.shares_memory(next(Arrays({"x": mapped}, 4).batches(0))["x"], mapped)


def test_unequal_leading_sizes_name_the_leaves():
    with pytest.raises(ValueError, match=r"`image` 5, `inner/label` 4"):
        Arrays({"image": np.zeros((5, 2)), "inner": {"label": np.zeros(4)}}, 2)


def test_leaves_of_records_are_named_and_so_are_arrays_without_a_number():
    with pytest.raises(TypeError, match="`names"):
        Arrays({"names": np.zeros(2, dtype=[("a", "i4")]), "label": np.arange(2)}, 1)
    with pytest.raises(TypeError, match="`names"):
        Arrays({"names": np.array(["a", "b"])}, 1)


@pytest.mark.parametrize(
    "leaf",
    [np.array(["a", "b"]), np.array([{}, {}], dtype=object), np.array(["2026-01-01"] * 2, dtype="M8[D]")],
    ids=["strings", "objects", "dates"],
)
def test_strings_and_objects_are_held_beside_numbers(leaf):
    source = Arrays({"names": leaf, "label": np.arange(2)}, 1)
    assert not source.is_numeric
    assert [batch["names"][0] for batch in source.batches(0)] == list(leaf)


@pytest.mark.parametrize("arrays", [{}, (), {"a": {}}, None])
def test_no_array(arrays):
    with pytest.raises(ValueError, match="no array"):
        Arrays(arrays, 2)


def test_no_example():
    with pytest.raises(ValueError, match=r"no example: `x` \[0, 3\]"):
        Arrays({"x": np.zeros((0, 3))}, 2)


def test_scalar_leaf_is_named():
    with pytest.raises(ValueError, match="`x/0` of Arrays is 0-d"):
        Arrays({"x": [1, 2, 3]}, 2)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_below_one(batch_size):
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {batch_size}"):
        Arrays(labelled(), batch_size)


def test_batch_size_and_seed_must_be_integers():
    with pytest.raises(TypeError, match=r"batch_size must be an int, got 2\.0"):
        Arrays(labelled(), 2.0)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        Arrays(labelled(), 2, seed=-1)


@pytest.mark.parametrize("options", [{"shuffle": True}, {"drop_last": True}])
def test_less_than_one_batch_says_what_to_do(options):
    with pytest.raises(ValueError, match=r"holds 23 examples.*batch_size=24.*at most 23, or drop_last=False"):
        Arrays(labelled(), 24, **options)


@pytest.mark.parametrize("key", ["label", "fine_labels", "Label"])
def test_nan_labels_are_named_and_counted(key):
    with pytest.raises(ValueError, match=f"`{key}` of Arrays has 2 NaN among 4"):
        Arrays({key: np.array([0.0, np.nan, 1.0, np.nan]), "image": np.zeros(4)}, 2)


def test_nan_elsewhere_is_the_users_business():
    assert np.isnan(next(Arrays({"image": np.array([np.nan, 0.0])}, 2).batches(0))["image"][0])


@pytest.mark.parametrize(("epoch", "start"), [(-1, 0), (0, -1), (0, 7)])
def test_positions_that_do_not_exist(epoch, start):
    source = Arrays(labelled(), 4)
    with pytest.raises(ValueError, match="start"):
        source.batches(epoch, start)
    with pytest.raises(ValueError, match="start"):
        source.row_numbers(epoch, start)


def test_the_last_of_a_million_batches_is_reached_directly():
    source = Arrays(np.arange(1_000_000), 1, shuffle=True)
    (last,) = source.batches(2, 999_999)
    assert last[0] == drawn(0, 2, 1_000_000)[-1]
