"""What a checkpoint holds apart from the train state, as JSON and device arrays. Owns the encoding of values.

Small NumPy arrays stand in the JSON, bit for bit; large ones, and JAX arrays, which may be divided over devices,
go where the train state goes.
"""

import base64
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainkit._core.tree import is_key

_TAG = "__trainkit__"
_SMALL = 1 << 14  # bytes


def encode(value: Any, arrays: dict[str, jax.Array | np.ndarray], where: str) -> Any:
    """Returns `value` as JSON; the large arrays in it are put into `arrays` and stand as references.

    Args:
        value: dicts, lists and tuples of numbers, strings, bytes, None, NumPy and JAX arrays.
        arrays: filled under numbers as strings.
        where: names the value in errors.

    Raises:
        TypeError: there is something else in it.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes):
        return {_TAG: "bytes", "data": base64.b64encode(value).decode()}
    if isinstance(value, jax.Array):
        return _reference(value, arrays)
    if isinstance(value, np.ndarray | np.generic):
        return _array(np.asarray(value), arrays, where)
    if isinstance(value, tuple | list):
        items = [encode(item, arrays, f"{where}[{index}]") for index, item in enumerate(value)]
        return items if isinstance(value, list) else {_TAG: "tuple", "items": items}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        items = {key: encode(item, arrays, f"{where}/{key}") for key, item in value.items()}
        return {_TAG: "dict", "items": items} if _TAG in value else items
    raise TypeError(
        f"{where} is of type {type(value).__name__}; a checkpoint holds numbers, strings, None, NumPy and JAX "
        "arrays, and lists, tuples and dicts (with str keys) of them. Convert it in state_dict()."
    )


def decode(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Returns what `encode` was given; JAX arrays come back as NumPy arrays, typed keys as keys."""
    if isinstance(value, list):
        return [decode(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_TAG)
    if kind is None:
        return {key: decode(item, arrays) for key, item in value.items()}
    if kind == "dict":
        return {key: decode(item, arrays) for key, item in value["items"].items()}
    if kind == "tuple":
        return tuple(decode(item, arrays) for item in value["items"])
    if kind == "array":
        data = base64.b64decode(value["data"])
        return np.frombuffer(data, jnp.dtype(value["dtype"])).reshape(value["shape"]).copy()
    if kind == "bytes":
        return base64.b64decode(value["data"])
    if kind == "empty":
        return np.zeros(value["shape"], jnp.dtype(value["dtype"]))
    array: Any = arrays[value["name"]]
    return jax.random.wrap_key_data(array, impl=value["impl"]) if kind == "key" else array


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
