"""The rules of a batch: its size, dtypes, padding, stacking and signature."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from trainkit.data import _batch


def make(rows=3):
    return {"image": np.arange(rows * 2, dtype=np.float32).reshape(rows, 2), "label": np.arange(rows)}


@pytest.mark.parametrize(
    "batch",
    [
        make(3),
        (np.zeros((3, 1)), np.zeros(3)),
        [np.zeros(3)],
        np.zeros((3, 4)),
        {"x": jnp.zeros(3), "temperature": np.float32(1), "scale": 2.0, "none": None},
        {"x": {"y": np.zeros(3)}, "empty": {}},
    ],
)
def test_batch_size_is_the_leading_one(batch):
    assert _batch.batch_size_of(batch) == 3


def test_batch_of_no_rows_has_size_zero():
    assert _batch.batch_size_of({"x": np.zeros((0, 2))}) == 0


def test_unequal_leading_sizes_name_paths_and_shapes():
    with pytest.raises(ValueError, match=r"`image` \[4, 2\], `inner/label` \[3\]"):
        _batch.batch_size_of({"image": np.zeros((4, 2)), "inner": {"label": np.zeros(3)}})


@pytest.mark.parametrize("batch", [{}, None, {"x": np.float32(1)}, 3.0, [[1, 2], [3]]])
def test_batch_without_rows(batch):
    with pytest.raises(ValueError, match="no leaf of it has a leading dimension"):
        _batch.batch_size_of(batch)


class Foreign:
    shape = (3,)
    dtype = "foreign.float32"


@pytest.mark.parametrize(
    "leaf",
    [np.array(["a"]), np.array([None]), np.zeros(1, "M8[s]"), np.zeros(1, "V4"), "text", b"text", Foreign()],
)
def test_leaves_that_are_not_numbers_are_named(leaf):
    with pytest.raises(TypeError, match="`inner/name`"):
        _batch.check_batch({"image": np.zeros(1), "inner": {"name": leaf}})


@pytest.mark.parametrize(
    "dtype", [np.bool_, np.int8, np.uint64, np.float16, np.complex64, ml_dtypes.bfloat16]
)
def test_numbers_pass_the_check(dtype):
    _batch.check_batch({"x": np.zeros(2, dtype), "y": jnp.zeros(2), "key": jax.random.key(0), "scale": 1.5})


@pytest.mark.parametrize("module", [np, jnp])
def test_pad_repeats_the_last_row(module):
    batch = {
        "x": module.array([[1.0, 2.0], [3.0, 4.0]], dtype=np.float32),
        "n": module.array([5, 6], np.int32),
    }
    padded = _batch.pad(batch, 4)
    assert isinstance(padded["x"], jax.Array) == (module is jnp)
    assert padded["x"].dtype == np.float32
    np.testing.assert_array_equal(padded["x"], [[1, 2], [3, 4], [3, 4], [3, 4]])
    np.testing.assert_array_equal(padded["n"], [5, 6, 6, 6])


def test_pad_leaves_the_input_and_scalars_alone():
    batch = {"x": np.array([1, 2]), "scale": 2.0, "zero_d": np.float32(3)}
    padded = _batch.pad(batch, 3)
    assert batch["x"].tolist() == [1, 2]
    assert padded["scale"] is batch["scale"]
    assert padded["zero_d"] is batch["zero_d"]


def test_a_full_batch_is_returned_itself():
    batch = make(3)
    assert _batch.pad(batch, 3) is batch


@pytest.mark.parametrize(("real", "rows"), [(0, 2), (3, 2)])
def test_pad_refuses(real, rows):
    with pytest.raises(ValueError, match=f"pad a batch of {real} rows to {rows}"):
        _batch.pad(make(real), rows)


@pytest.mark.parametrize("real", [1, 2, 5])
def test_unpad_undoes_pad(real):
    batch = make(real) | {"scale": 2.0}
    back = _batch.unpad(_batch.pad(batch, 5), real)
    assert back["scale"] == 2.0
    for name in ("image", "label"):
        np.testing.assert_array_equal(back[name], batch[name], strict=True)


@pytest.mark.parametrize(("rows", "real", "expected"), [(3, 2, [1, 1, 0]), (2, 2, [1, 1]), (2, 0, [0, 0])])
def test_mask(rows, real, expected):
    np.testing.assert_array_equal(_batch.mask(rows, real), np.array(expected, bool), strict=True)
