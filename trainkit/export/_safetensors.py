"""Named arrays and text as the bytes of a `.safetensors` file, with a checksum. Knows no trees, no files."""

import hashlib
import json
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from trainkit._core.arrays import array_of

_CHECKSUM = "trainkit.sha256"
_DTYPES = {
    **{"BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32"},
    **{"I32": "int32", "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16"},
    **{"F32": "float32", "F64": "float64", "C64": "complex64"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
}


def encode(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Returns the file with `arrays` by name and `metadata` in its header.

    Raises:
        ValueError: the format has not the dtype of an array; the message names it.
        ImportError: safetensors is not installed.
    """
    library = _library()
    for name, array in arrays.items():
        if array.dtype.name not in _DTYPES.values():
            raise ValueError(
                f"{name} has dtype {array.dtype}, which .safetensors cannot hold; it holds "
                f"{', '.join(_DTYPES.values())}. Cast it, or save as .msgpack."
            )
    # The library reads the buffer from its first byte on, whatever the strides: it must be contiguous.
    plain = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    return library.save(plain, metadata={**metadata, _CHECKSUM: _digest(plain, metadata)})


def decode(content: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the arrays and the metadata of a file that `encode` made.

    Raises:
        ValueError: the content is cut short, altered, or made by something else; the message says which.
        ImportError: safetensors is not installed.
    """
    library = _library()
    try:
        # First of all: it allocates nothing for what a header claims, and knows which headers there are.
        arrays = {name: _array(entry) for name, entry in library.deserialize(content)}
    except Exception as error:  # the library's own exception class is not part of its public interface
        raise ValueError(f"it is not a whole .safetensors file ({error})") from error
    metadata = _metadata(content)
    expected = metadata.pop(_CHECKSUM, None)
    if expected is None:
        raise ValueError("it has no trainkit checksum in its header")
    if (found := _digest(arrays, metadata)) != expected:
        raise ValueError(f"its sha256 is {found[:16]}..., and {expected[:16]}... was written")
    return arrays, metadata


def parsed(text: Any, kind: type) -> Any:
    """Returns what JSON in a file says.

    Args:
        text: the JSON, as it was read.
        kind: dict or list.

    Raises:
        ValueError: it is none, or says something of another kind.
    """
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"its description is not JSON ({error})") from error
    if not isinstance(value, kind):
        raise ValueError(f"its description is a {type(value).__name__}, not a {kind.__name__}")
    return value


def _metadata(content: bytes) -> dict[str, str]:
    length = int.from_bytes(content[:8], "little")
    metadata = parsed(content[8 : 8 + length], dict).get("__metadata__", {})
    return dict(metadata) if isinstance(metadata, dict) else {}


def _array(entry: Mapping[str, Any]) -> np.ndarray:
    # The library's own reader for NumPy knows neither bfloat16 nor the float8 types.
    dtype = jnp.dtype(_DTYPES[entry["dtype"]])
    return array_of(bytearray(entry["data"]), dtype, entry["shape"])


def _digest(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """Returns the sha256 of everything that is read back: names, dtypes, shapes, bytes and metadata."""
    names = sorted(arrays)
    index = [[name, arrays[name].dtype.name, list(arrays[name].shape)] for name in names]
    digest = hashlib.sha256(json.dumps([index, dict(metadata)], sort_keys=True).encode())
    for name in names:
        digest.update(np.asarray(arrays[name], order="C").reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _library() -> ModuleType:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "this needs the package safetensors, which is not installed: pip install 'trainkit[export]'."
        ) from error
    return safetensors.numpy
