"""What callbacks remember comes back as it was, bit for bit."""

import json
import math
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compare import assert_same
from trainkit.checkpoint._encoding import decode, encode

VALUES = {
    "none": None,
    "bools": [True, False],
    "ints": [0, -1, 2**80],
    "floats": [0.1, -0.0, 1e-320, math.inf, -math.inf],
    "text": "a 'name' with \u00fc, \n and __trainkit__",
    "nested": {"a": [{"b": (1, (2.5, "c"), [])}], "d": {}},
    "empty tuple": (),
}
ARRAYS = {
    "float64": np.array([[0.1, -0.0, 5e-324], [np.inf, -np.inf, 2.0]]),
    "float32": np.float32([1 / 3, 1e-45]),
    "float16": np.arange(4, dtype=np.float16),
    "bfloat16": np.asarray(jnp.arange(5, dtype=jnp.bfloat16) / 3),
    "float8": np.asarray(jnp.arange(5, dtype=jnp.float8_e4m3fn)),
    "int8": np.array([-128, 127], np.int8),
    "uint64": np.array([2**64 - 1], np.uint64),
    "int4": np.asarray(jnp.array([-8, 7], jnp.int4)),
    "bool": np.array([[True], [False]]),
    "complex": np.array([1 + 2j]),
    "0-d": np.array(3, np.int16),
    "no elements": np.zeros((3, 0, 2), np.float32),
    "a view": np.arange(12.0).reshape(3, 4)[::2, ::-1],
    "big-endian": np.array([1.5, 2.5], ">f8"),
    "large": np.random.default_rng(0).normal(size=(70, 50)),
}


def there_and_back(value):
    arrays = {}
    text = json.dumps(encode(value, arrays, "value"))
    stored = {name: np.asarray(array) for name, array in arrays.items()}
    return decode(json.loads(text), stored), arrays


@pytest.mark.parametrize("name", VALUES)
def test_values_come_back(name):
    back, arrays = there_and_back({name: VALUES[name]})
    assert repr(back) == repr({name: VALUES[name]})
    assert arrays == {}


def test_nan_comes_back():
    assert math.isnan(there_and_back([math.nan])[0][0])


@pytest.mark.parametrize("name", ARRAYS)
def test_numpy_arrays_come_back(name):
    back, _ = there_and_back({"array": ARRAYS[name]})
    array = back["array"]
    assert isinstance(array, np.ndarray)
    assert array.flags.writeable
    assert (array.dtype, array.shape) == (ARRAYS[name].dtype, ARRAYS[name].shape)
    assert array.tobytes() == ARRAYS[name].tobytes()


def test_the_bits_of_a_nan_come_back():
    array = np.array([0x7FF80000DEADBEEF, 0xFFF0000000000001], np.uint64).view(np.float64)
    assert there_and_back(array)[0].tobytes() == array.tobytes()


def test_numpy_scalars_come_back_as_arrays():
    back, _ = there_and_back(np.float32(0.1))
    assert_same(back, np.array(0.1, np.float32))


def test_large_arrays_are_not_put_into_the_json():
    large = ARRAYS["large"]
    text = encode({"a": large, "b": large[:2]}, arrays := {}, "value")
    assert len(json.dumps(text)) < 2000
    (stored,) = arrays.values()
    kept = large.copy()
    assert not np.shares_memory(
        stored, large
    )  # its owner may go on to write into it while the files are written
    np.testing.assert_array_equal(stored, kept)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_come_back_as_keys(impl):
    keys = jax.random.split(jax.random.key(7, impl=impl), 3)
    back, arrays = there_and_back({"keys": keys})
    assert back["keys"].dtype == keys.dtype
    assert_same(back["keys"], keys)
    assert [array.dtype for array in arrays.values()] == [np.uint32]


def test_jax_arrays_go_beside_the_json():
    tree = {"a": jnp.arange(3.0), "b": [jnp.zeros((0, 2), jnp.bfloat16), jnp.int32(4)]}
    back, arrays = there_and_back(tree)
    assert_same(back, jax.device_get(tree))
    assert len(arrays) == 2  # one without elements holds nothing


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {1, 2}}, r"value/a is of type set; a checkpoint holds .* Convert it in state_dict\(\)"),
        ([0, {"f": print}], r"value\[1\]/f is of type builtin_function_or_method"),
        ({1: 2}, r"value is of type dict; .* \(with str keys\)"),
        ({"a": np.array(["x"])}, r"value/a has dtype <U1; only numbers and bools"),
        ({"a": np.array([None])}, r"value/a has dtype object"),
        ({"a": np.zeros(2, [("x", "f4")])}, r"value/a has dtype .*x"),
        ({"a": np.array(["2020-01-01"], "M8[D]")}, r"value/a has dtype datetime64"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_its_place(value, message):
    with pytest.raises(TypeError, match=message):
        encode(value, {}, "value")


def test_a_dict_that_looks_like_ours_comes_back():
    value = {"__trainkit__": "tuple", "items": [1]}
    assert there_and_back({"mine": value})[0] == {"mine": value}


def tagged(kind, **fields):
    return {"__trainkit__": kind, **fields}


def deep(levels):
    value = 1
    for _ in range(levels):
        value = [value]
    return value


WRONG = {
    "unknown kind": tagged("pickle", data="gASV"),
    "kind is a list": tagged(["array"]),
    "kind is null": tagged(None),
    "no shape": tagged("array", dtype="float32", data=""),
    "no dtype": tagged("array", shape=[0], data=""),
    "no data": tagged("array", dtype="float32", shape=[0]),
    "data is a number": tagged("bytes", data=3),
    "no base64": tagged("bytes", data="a\u00fc=="),
    "base64 of another size": tagged("array", dtype="float32", shape=[2], data="AAAA"),
    "a huge shape": tagged("array", dtype="float32", shape=[2**40], data="AAAA"),
    "sizes that wrap around": tagged("array", dtype="float32", shape=[2**62, 4], data=""),
    "a negative size": tagged("array", dtype="int8", shape=[-3], data="AAAA"),
    "a size that is true": tagged("array", dtype="int8", shape=[True], data="AA=="),
    "a size that is text": tagged("array", dtype="int8", shape=["3"], data="AAAA"),
    "a shape that is a number": tagged("array", dtype="int8", shape=3, data="AAAA"),
    "a million dimensions": tagged("array", dtype="int8", shape=[2**60] * 10**6, data="AAAA"),
    "objects": tagged("array", dtype="object", shape=[1], data="AAAAAAAAAAA="),
    "objects by letter": tagged("empty", dtype="O", shape=[0]),
    "large elements": tagged("empty", dtype="1000000000f4", shape=[0]),
    "a dtype of keys": tagged("empty", dtype="key<fry>", shape=[0]),
    "empty and full": tagged("empty", dtype="float32", shape=[2**36]),
    "empty and gigantic": tagged("empty", dtype="float32", shape=[0, 2**62]),
    "an array that is not there": tagged("stored", name="7"),
    "no name": tagged("stored"),
    "a name that is a list": tagged("stored", name=[]),
    "keys that are not there": tagged("key", name="7", impl="rbg"),
    "another generator": tagged("key", name="0", impl="dice"),
    "no generator": tagged("key", name="0"),
    "no keys": tagged("key", name="1", impl="threefry2x32"),
    "no items": tagged("tuple"),
    "items of a tuple": tagged("tuple", items={"a": 1}),
    "items of a dict": tagged("dict", items=[1]),
    "deep": deep(200),
    "deep tuples": tagged("tuple", items=[deep(120)]),
    "deeper than Python goes": deep(50_000),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_was_not_encoded_is_refused(name):
    stored = {"0": np.zeros(2, np.uint32), "1": np.zeros(3, np.float32)}
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"\w"):
            decode({"callbacks": [WRONG[name]]}, stored)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_as_deep_as_may_be_is_a_rule_of_both_sides():
    value = deep(100)
    assert there_and_back(value)[0] == value
    with pytest.raises(ValueError, match=r"nested more than 100 deep. Flatten it"):
        encode(deep(101), {}, "value")
