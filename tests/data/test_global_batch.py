"""Batches of several processes, read in part: the rows are those of the batch, and no others are touched."""

import jax
import numpy as np
import pytest

import trainkit as tk
from tests.helpers.compare import assert_same
from trainkit.data._batch import as_global, spec_of

ROWS = {"x": np.arange(22.0, dtype=np.float32).reshape(11, 2), "label": np.arange(11, dtype=np.int32)}


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("start", [0, 2])
def test_arrays_give_the_rows_of_their_batches(shuffle, start):
    source = tk.data.Arrays(ROWS, 4, shuffle=shuffle, drop_last=False)
    found = list(source.global_batches(3, start))
    expected = list(source.batches(3, start))
    assert [batch.size for batch in found] == [4, 4, 3][start:]
    for batch, whole in zip(found, expected, strict=True):
        assert_same(batch.read(0, batch.size), whole)
        assert_same(batch.read(1, 3), jax.tree.map(lambda leaf: leaf[1:3], whole))
        assert batch.spec() == jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), whole)


def test_arrays_refuse_a_position_beyond_their_end():
    with pytest.raises(ValueError, match="start=4 lies beyond the 3 batches"):
        tk.data.Arrays(ROWS, 4).global_batches(0, 4)


def test_arrays_read_the_rows_asked_for_and_no_others(tmp_path):
    """Of a sparse file all of which would not fit, one row in the middle is read."""
    shape = (2**24, 2**10)
    sparse = np.memmap(tmp_path / "rows", np.float64, "w+", shape=shape)
    sparse[2**23 + 1] = 7
    source = tk.data.Arrays({"x": sparse}, 2**24)
    (batch,) = source.global_batches(0)
    np.testing.assert_array_equal(batch.read(2**23, 2**23 + 2)["x"][:, :2], [[0, 0], [7, 7]])


def test_other_sources_are_cut():
    batches = [{"x": np.arange(3.0), "scale": np.float32(2)}, {"x": np.arange(2.0), "scale": np.float32(3)}]
    first, second = tk.data.as_source(batches).global_batches(0)
    assert (first.size, second.size) == (3, 2)
    assert_same(first.read(1, 3), {"x": np.array([1.0, 2.0]), "scale": np.float32(2)})
    assert_same(second.read(0, 1), {"x": np.array([0.0]), "scale": np.float32(3)})


def test_a_spec_stands_for_its_batch_alone_and_in_a_group():
    (batch,) = tk.data.Arrays({"x": np.zeros((3, 2), np.float32)}, 3).global_batches(0)
    spec = {"x": jax.ShapeDtypeStruct((3, 2), np.float32)}
    assert spec_of(batch) == spec
    assert spec_of((batch, batch)) == (spec, spec)
    given = {"x": np.zeros(3)}
    assert spec_of(given)["x"] is spec_of(as_global(given))["x"] is given["x"]
