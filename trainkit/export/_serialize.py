"""`save` and `load`: one tree of arrays in one file, and a tree put back into the structure of another.

Owns the two formats and the checks; not the folders, the schedule or the data position of a run, which
checkpoints own.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np

from trainkit._core.arrays import dtype_of
from trainkit._core.atomic import write_atomic
from trainkit._core.files import read_regular
from trainkit._core.tree import describe, is_key, named_leaves, nested, odd_keys
from trainkit._core.typing import PyTree
from trainkit.export._safetensors import decode, encode, parsed

_MAGIC = b"trainkit.msgpack"
_HEADER = len(_MAGIC) + 32 + 8
_KIND, _IMPLS, _PATHS = "trainkit.kind", "trainkit.keys", "trainkit.paths"
_ROOT = "(root)"
_DEEPEST = 200
# What a Python number in a template may be read from.
_NUMBERS = {bool: np.bool_, int: np.integer, float: np.floating, complex: np.complexfloating}


class Packed(NamedTuple):
    """A tree as files hold it.

    Attributes:
        arrays: the leaves by path in tree order, on the host; of typed keys their `uint32` data.
        impls: the generator of each leaf that is typed keys, by path.
        keys: of dicts, those that a path does not tell: with a `/` in them, or ints; by path.
    """

    arrays: dict[str, np.ndarray]
    impls: dict[str, str]
    keys: Mapping[str, list[str | int]] = MappingProxyType({})


def save(path: str | os.PathLike[str], tree: PyTree) -> None:
    """Writes the arrays of `tree` to one file, whole or not at all, with a checksum.

    The suffix chooses the format. `.safetensors` (needs the extra `export`) is flat, by paths joined with
    `/`, and other programs read it; `.msgpack` is Flax's format behind a header of 56 bytes, and also holds
    dtypes that `.safetensors` lacks. Typed PRNG keys are saved with the name of their generator. What is no
    array (the structure itself, static fields) is not in the file: `load(path, like=...)` takes it from a
    template.

    Args:
        path: file to write, `*.safetensors` or `*.msgpack`; an existing one is replaced.
        tree: any pytree of arrays and numbers: params, a `TrainState`, optimizer state.

    Raises:
        ValueError: unknown suffix; two leaves share a path; a dtype that the format cannot hold.
        TypeError: a leaf is neither an array nor a number.
        ImportError: `.safetensors` without the package.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "params.msgpack"
        >>> save(path, {"dense": {"bias": np.zeros(3, np.float32)}})
        >>> load(path)["dense"]["bias"]
        array([0., 0., 0.], dtype=float32)
    """
    write, _ = _format(path)
    write_atomic(path, write(pack(tree)))


def load(path: str | os.PathLike[str], *, like: PyTree = None) -> PyTree:
    """Returns the tree that `save` wrote to `path`.

    Args:
        path: a file that `save` wrote.
        like: a tree of the same structure, shapes and dtypes: arrays, or what `jax.eval_shape` returns.
            None: the file's own structure is returned, nested dicts by path. Keys of dicts come back as they were,
            those with a `/` and ints too; places in lists and tuples and fields of dataclasses become keys.

    Returns:
        With `like`, its structure with the saved values: NumPy arrays where it has NumPy arrays, else JAX
        arrays, placed as those of `like` are. Without, nested dicts of NumPy arrays (typed keys come back as
        such).

    Raises:
        ValueError: unknown suffix; the file is cut short, altered or not from `save`; `like` differs from
            what was saved: each path that does is named.
        OSError: there is no file, or something else than one.
    """
    _, read = _format(path)
    content = read_regular(os.path.realpath(path))
    try:
        packed = read(content)
        _check(packed)
        values = unpack(packed)
        nest(values, packed.keys)
    except ValueError as error:
        raise ValueError(
            f"{os.fspath(path)}: {error}. Expected a whole file as tk.save wrote it; save it anew or take "
            "another copy."
        ) from error
    return nest(values, packed.keys) if like is None else restore(like, values, source=os.fspath(path))


def restore(like: PyTree, state_dict: PyTree, *, source: str = "state_dict") -> PyTree:
    """Returns `like` with its leaves replaced by those of `state_dict` at the same paths.

    Args:
        like: the template; arrays, `jax.ShapeDtypeStruct`s or Python numbers as leaves.
        state_dict: arrays by path, flat (`{"a/b": x}`) or nested (`{"a": {"b": x}}`).
        source: what to call `state_dict` in an error.

    Raises:
        ValueError: a path is missing or unexpected, or a shape or dtype differs; every one is named.
    """
    saved, wanted = dict(named_leaves(state_dict)), named_leaves(like)
    names = {name for name, _ in wanted}
    lines = [line for name, leaf in wanted if (line := _difference(name, leaf, saved))]
    lines += [f"{name}: unexpected, saved as {describe(saved[name])}" for name in saved if name not in names]
    if lines:
        raise ValueError(
            f"{source} does not fit like=, {len(lines)} of the paths differ:\n  "
            + "\n  ".join(lines)
            + "\nPass a template with the paths, shapes and dtypes that were saved; load without like= shows "
            "them."
        )
    leaves = [_placed(leaf, saved[name]) for name, leaf in wanted]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def pack(tree: PyTree) -> Packed:
    """Returns the leaves of `tree` on the host, by path.

    Raises:
        TypeError: a leaf is neither an array nor a number.
        ValueError: two leaves share a path, or an array lies on other hosts.
    """
    leaves = named_leaves(tree)
    _check_names(name for name, _ in leaves)
    impls = {name: str(jax.random.key_impl(leaf)) for name, leaf in leaves if is_key(leaf)}
    raw = {name: jax.random.key_data(leaf) if name in impls else leaf for name, leaf in leaves}
    for name, leaf in raw.items():
        _check_leaf(name, leaf)
    # One call, so that the copies from the devices overlap; of a list, because a dict would come back sorted.
    host = jax.device_get(list(raw.values()))
    return Packed({name: _native(leaf) for name, leaf in zip(raw, host, strict=True)}, impls, odd_keys(tree))


def unpack(packed: Packed) -> dict[str, Any]:
    """Returns the leaves by path: NumPy arrays, and typed keys where there were.

    Raises:
        ValueError: what are to be keys are none.
    """
    return {
        name: _keys(name, array, packed.impls[name]) if name in packed.impls else array
        for name, array in packed.arrays.items()
    }


def _keys(name: str, data: np.ndarray, impl: str) -> jax.Array:
    try:
        return jax.random.wrap_key_data(jnp.asarray(data), impl=impl)
    except Exception as error:  # JAX has a different one for every way to be wrong
        raise ValueError(f"{name:.60} holds no keys of the generator {impl!r:.40} ({error})") from error


def nest(values: Mapping[str, Any], keys: Mapping[str, list[str | int]] = MappingProxyType({})) -> PyTree:
    """Returns nested dicts from values by path, with the keys that a path does not tell; that of the root bare.

    Raises:
        ValueError: a path is both that of a value and of a branch.
    """
    return values[_ROOT] if list(values) == [_ROOT] else nested(values, dict(keys))


def _format(path: str | os.PathLike[str]) -> tuple[Callable[[Packed], bytes], Callable[[bytes], Packed]]:
    suffix = pathlib.Path(path).suffix
    if suffix == ".safetensors":
        return _to_safetensors, _from_safetensors
    if suffix == ".msgpack":
        return _to_msgpack, _from_msgpack
    raise ValueError(
        f"{os.fspath(path)}: the suffix {suffix!r} names no format; name the file *.safetensors or *.msgpack."
    )


def _to_safetensors(packed: Packed) -> bytes:
    return encode(
        packed.arrays,
        {_KIND: "tree", _IMPLS: json.dumps(packed.impls), _PATHS: json.dumps(dict(packed.keys))},
    )


def _from_safetensors(content: bytes) -> Packed:
    arrays, metadata = decode(content)
    if metadata.get(_KIND) != "tree":
        raise ValueError(f"it holds another kind of content, {metadata.get(_KIND, 'unknown')!r}")
    impls, keys = (parsed(metadata.get(name, "{}"), dict) for name in (_IMPLS, _PATHS))
    return Packed(arrays, impls, keys)


def _to_msgpack(packed: Packed) -> bytes:
    content = {"keys": packed.impls, "tree": nest(packed.arrays), "paths": json.dumps(dict(packed.keys))}
    payload = flax.serialization.msgpack_serialize(content)
    return _MAGIC + hashlib.sha256(payload).digest() + len(payload).to_bytes(8, "little") + payload


def _from_msgpack(content: bytes) -> Packed:
    if not content.startswith(_MAGIC):
        raise ValueError("it does not begin with the header of tk.save")
    digest, payload = content[len(_MAGIC) : _HEADER - 8], content[_HEADER:]
    length = int.from_bytes(content[_HEADER - 8 : _HEADER], "little")
    if len(payload) != length:
        raise ValueError(f"it has {len(payload)} bytes of content, and {length} were written")
    if (found := hashlib.sha256(payload).digest()) != digest:
        raise ValueError(f"its sha256 is {found.hex()[:16]}..., and {digest.hex()[:16]}... was written")
    try:
        stored: Any = flax.serialization.msgpack_restore(payload)
        leaves = named_leaves(stored["tree"])
        impls, paths = stored["keys"], stored.get("paths", "{}")
    except Exception as error:  # Flax has a different one for every way to be wrong
        raise ValueError(
            f"its content is not that of a tree ({type(error).__name__}: {str(error)[:100]})"
        ) from error
    if other := next((name for name, leaf in leaves if not isinstance(leaf, np.ndarray)), None):
        raise ValueError(f"it has no array at {other:.60}")
    # Views of the payload are read-only, and the caller owns what it gets.
    return Packed({name: np.array(leaf) for name, leaf in leaves}, impls, parsed(paths, dict))


def _check(packed: Packed) -> None:
    """Refuses with a ValueError what `pack` does not make."""
    arrays, impls, keys = packed
    _check_names(arrays)
    for array in arrays.values():
        dtype_of(str(array.dtype))
    if not isinstance(impls, dict) or not all(isinstance(impl, str) for impl in impls.values()):
        raise ValueError("its generators of keys are not as they were written")
    for name, path in keys.items():
        plain = isinstance(path, list) and all(type(key) in (str, int) for key in path)
        if not plain or "/".join(map(str, path)) != name:
            raise ValueError(f"the keys of {name:.60} are not as they were written")


def _check_names(names: Iterable[str]) -> None:
    """Refuses paths that a file cannot tell apart, e.g. `{"a/b": x, "a": {"b": y}}`, and endless ones."""
    seen: set[str] = set()
    for name in names:
        if name.count("/") > _DEEPEST:
            raise ValueError(f"the path {name:.60}... is more than {_DEEPEST} deep; flatten the tree.")
        if name in seen or name == "__metadata__":
            what = "used twice" if name in seen else "reserved"
            raise ValueError(f"the path {name} is {what}; rename a key.")
        seen.add(name)
    for name in seen:
        parents = [name[:at] for at, letter in enumerate(name) if letter == "/"]
        if clash := next((parent for parent in parents if parent in seen), None):
            raise ValueError(f"the path {clash} is a leaf and also holds {name}; rename a key.")


def _check_leaf(name: str, leaf: Any) -> None:
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
        raise TypeError(
            f"{name} is of type {describe(leaf)}; only arrays, numbers and typed PRNG keys are saved. "
            "Take it out."
        )
    if isinstance(leaf, np.ndarray | np.generic) and (leaf.dtype.kind in "OUSMm" or leaf.dtype.fields):
        raise TypeError(
            f"{name} has dtype {leaf.dtype}; only numbers and bools are saved. Convert it, or take it out."
        )
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        raise ValueError(
            f"{name} lies partly on the devices of other hosts; gather it first with "
            "jax.experimental.multihost_utils.process_allgather, or save a checkpoint."
        )


def _native(leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    return array.astype(array.dtype.newbyteorder("=")) if array.dtype.byteorder == ">" else array


def _difference(name: str, template: Any, saved: Mapping[str, Any]) -> str | None:
    """Returns how the saved leaf differs from its template, None if it does not."""
    if name not in saved:
        return f"{name}: missing, like has {describe(template)}"
    leaf = saved[name]
    if (number := _NUMBERS.get(type(template))) is not None:
        fits = np.shape(leaf) == () and not is_key(leaf) and jnp.issubdtype(leaf.dtype, number)
    else:
        fits = describe(leaf) == describe(template)
    return None if fits else f"{name}: saved as {describe(leaf)}, like has {describe(template)}"


def _placed(template: Any, value: Any) -> Any:
    """Returns `value` as the kind of object that `template` is, on the same devices."""
    if type(template) in _NUMBERS:
        return type(template)(value.item())
    if isinstance(template, np.generic):
        return value[()]
    if isinstance(template, np.ndarray):
        return value
    # An array that nobody placed stays free to follow the others of a computation.
    placed = template.sharding if getattr(template, "committed", True) else None
    return jnp.asarray(value) if placed is None else jax.device_put(value, placed)
