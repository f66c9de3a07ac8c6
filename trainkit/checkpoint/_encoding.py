"""What a checkpoint holds apart from the train state, as JSON and device arrays. Owns the encoding of values.

Small NumPy arrays stand in the JSON, bit for bit; large ones, and JAX arrays, which may be divided over devices,
go where the train state goes.
"""

import base64
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from trainkit._core.arrays import array_of, dtype_of, shape_of
from trainkit._core.tree import is_key

_TAG = "__trainkit__"
_SMALL = 1 << 14  # bytes
# Far from where Python's own limit lies, which depends on who calls.
_DEEPEST = 100


def encode(value: Any, arrays: dict[str, jax.Array | np.ndarray], where: str, depth: int = 0) -> Any:
    """Returns `value` as JSON; the large arrays in it are put into `arrays` and stand as references.

    Args:
        value: dicts, lists and tuples of numbers, strings, bytes, None, NumPy and JAX arrays.
        arrays: filled under numbers as strings.
        where: names the value in errors.
        depth: how far within the whole it lies.

    Raises:
        TypeError: there is something else in it.
        ValueError: it is nested more than 100 deep.
    """
    if depth > _DEEPEST:
        raise ValueError(f"{where} is nested more than {_DEEPEST} deep. Flatten it in state_dict().")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes):
        return {_TAG: "bytes", "data": base64.b64encode(value).decode()}
    if isinstance(value, jax.Array):
        return _reference(value, arrays)
    if isinstance(value, np.ndarray | np.generic):
        return _array(np.asarray(value), arrays, where)
    if isinstance(value, tuple | list):
        items = [encode(item, arrays, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {_TAG: "tuple", "items": items}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        items = {key: encode(item, arrays, f"{where}/{key}", depth + 1) for key, item in value.items()}
        return {_TAG: "dict", "items": items} if _TAG in value else items
    raise TypeError(
        f"{where} is of type {type(value).__name__}; a checkpoint holds numbers, strings, None, NumPy and JAX "
        "arrays, and lists, tuples and dicts (with str keys) of them. Convert it in state_dict()."
    )


def decode(value: Any, arrays: Mapping[str, np.ndarray], depth: int = 0) -> Any:
    """Returns what `encode` was given; JAX arrays come back as NumPy arrays, typed keys as keys.

    Args:
        value: JSON.
        arrays: those that stand as references, by name.
        depth: how far within the whole it lies.

    Raises:
        ValueError: `encode` can't have written it.
    """
    if depth > _DEEPEST:
        raise ValueError(f"it is nested more than {_DEEPEST} deep")
    if isinstance(value, list):
        return [decode(item, arrays, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: decode(item, arrays, depth + 1) for key, item in value.items()}
    kind = value[_TAG]
    if kind == "dict":
        items = _field(value, "items", dict)
        return {key: decode(item, arrays, depth + 1) for key, item in items.items()}
    if kind == "tuple":
        return tuple(decode(item, arrays, depth + 1) for item in _field(value, "items", list))
    if kind == "array":
        dtype, shape = dtype_of(value.get("dtype")), value.get("shape")
        return array_of(_bytes(value), dtype, shape).copy()
    if kind == "bytes":
        return _bytes(value)
    if kind == "empty":
        shape = shape_of(value.get("shape"))
        if math.prod(shape):
            raise ValueError(f"an array of shape {list(shape)} is said to be empty")
        return np.zeros(shape, dtype_of(value.get("dtype")))
    if kind not in ("stored", "key"):
        raise ValueError(f"it has a value of the unknown kind {kind!r:.40}")
    name = _field(value, "name", str)
    if name not in arrays:
        raise ValueError(f"it refers to the array {name!r:.40}, which is not there")
    return _key(arrays[name], _field(value, "impl", str)) if kind == "key" else arrays[name]


def _field(value: dict[str, Any], name: str, kind: type) -> Any:
    if not isinstance(value.get(name), kind):
        raise ValueError(f"a value of kind {value[_TAG]!r:.40} lacks {name!r}")
    return value[name]


def _bytes(value: dict[str, Any]) -> bytes:
    return base64.b64decode(_field(value, "data", str), validate=True)


def _key(data: Any, impl: str) -> jax.Array:
    try:
        return jax.random.wrap_key_data(data, impl=impl)
    except Exception as error:  # JAX has a different one for every way to be wrong
        raise ValueError(f"it has no keys of the generator {impl!r:.40} ({error})") from error


def _array(array: np.ndarray, arrays: dict[str, jax.Array | np.ndarray], where: str) -> dict[str, Any]:
    if array.dtype.kind in "OUSMm" or array.dtype.fields:
        raise TypeError(f"{where} has dtype {array.dtype}; only numbers and bools are kept in a checkpoint.")
    if array.nbytes > _SMALL and array.dtype.isnative:
        # A copy, for it is written while its owner goes on.
        arrays[str(len(arrays))] = array.copy()
        return {_TAG: "stored", "name": str(len(arrays) - 1)}
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {_TAG: "array", "dtype": str(array.dtype), "shape": list(array.shape), "data": data}


def _reference(array: jax.Array, arrays: dict[str, jax.Array | np.ndarray]) -> dict[str, Any]:
    if not array.size:  # holds nothing, and Orbax does not take it
        return {_TAG: "empty", "dtype": str(array.dtype), "shape": list(array.shape)}
    name = str(len(arrays))
    if is_key(array):
        arrays[name] = _shared(jax.random.key_data(array))
        return {_TAG: "key", "name": name, "impl": str(jax.random.key_impl(array))}
    arrays[name] = _shared(array)
    return {_TAG: "stored", "name": name}


def _shared(array: jax.Array) -> jax.Array | np.ndarray:
    # Of several processes each has one of its own, of which the first's is written; Orbax wants NumPy for that.
    alone = jax.process_count() > 1 and array.is_fully_addressable
    return np.asarray(array) if alone else array
