"""The list of a checkpoint's files with their sizes and checksums: tells a whole checkpoint from a damaged one.

Owns the list; not the format of the files, which is Orbax's. A folder may come from elsewhere: of what it holds only
regular files are opened, and only those that lie in it.
"""

import concurrent.futures
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from trainkit._core.files import open_regular, read_regular

NAME = "trainkit_manifest.json"
"""The file, in the folder of the checkpoint."""

_CHUNK = 1 << 22
# Orbax writes the time of completion into it afterwards.
_CHANGES = "_CHECKPOINT_METADATA"
_ITEM = ("_METADATA", "manifest.ocdbt")
"""Files without which an item of Orbax can't be read."""


def write_manifest(
    folder: pathlib.Path, *, items: tuple[str, ...] = (), documents: tuple[str, ...] = ()
) -> None:
    """Lists every file in `folder`, which nothing writes to any more.

    Args:
        folder: of the checkpoint.
        items: of Orbax, each of which must be there as a whole.
        documents: names of files that must be there.

    Raises:
        FileNotFoundError: one of them is not.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != _CHANGES]
    entries = {str(path.relative_to(folder)): [path.stat().st_size, _checksum(path)] for path in files}
    missing = _required(items, documents) - entries.keys()
    if missing:
        raise FileNotFoundError(
            None,
            f"was not written, and without it nothing could be read back ({len(entries)} other files were)",
            str(folder / min(missing)),
        )
    with open(folder / NAME, "w", encoding="utf-8") as file:
        json.dump(entries, file)
        file.flush()
        os.fsync(file.fileno())


def problems(
    folder: pathlib.Path, *, items: tuple[str, ...] = (), documents: tuple[str, ...] = ()
) -> list[str]:
    """Returns what is wrong with the files of a checkpoint, one line each; empty where it is whole.

    Args:
        folder: of the checkpoint.
        items: as in `write_manifest`.
        documents: as in `write_manifest`.
    """
    try:
        read_json(folder, _CHANGES)
        entries = read_json(folder, NAME)
    except (OSError, ValueError) as error:
        return [str(error)]
    missing = [f"{name}: is not listed" for name in sorted(_required(items, documents) - entries.keys())]
    found = _side_by_side(lambda name: _problem(folder, name, entries[name]), entries)
    return missing + [f"{name}: {problem}" for name, problem in zip(entries, found, strict=True) if problem]


def read_json(folder: pathlib.Path, name: str) -> dict[str, Any]:
    """Returns a document of a checkpoint.

    Args:
        folder: of the checkpoint.
        name: of the file.

    Raises:
        ValueError: it is no JSON object.
        OSError: it is missing, no regular file, or can't be read.
    """
    try:
        document = json.loads(read_regular(folder / name))
    except OSError as error:
        raise OSError(f"{name}: cannot be read ({error})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: cannot be read ({error})") from error
    if not isinstance(document, dict):
        raise ValueError(f"{name}: cannot be read (it is a {type(document).__name__}, no JSON object)")
    return document


def listed(folder: pathlib.Path) -> list[str]:
    """Returns the names of the files that were written with a checkpoint; none where its list can't be read."""
    try:
        entries = read_json(folder, NAME)
    except (OSError, ValueError):
        return []
    return [name for name in entries if _is_inside(name)]


def _side_by_side(look: Callable[[str], str | None], entries: Mapping[str, Any]) -> list[str | None]:
    # Checksums are computed without Python's lock; small files take less than the threads.
    if sum(entry[0] for entry in entries.values() if _is_entry(entry)) < _CHUNK:
        return [look(name) for name in entries]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(look, entries))


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and all(type(number) is int for number in entry)


def _required(items: tuple[str, ...], documents: tuple[str, ...]) -> set[str]:
    return {f"{item}/{name}" for item in items for name in _ITEM} | set(documents)


def _is_inside(name: str) -> bool:
    parts = name.split("/")
    return "\0" not in name and not any(part in ("", ".", "..") for part in parts)


def _problem(folder: pathlib.Path, name: str, entry: Any) -> str | None:
    if not _is_inside(name):
        return "is no file of this folder"
    if not _is_entry(entry):
        return "its size and checksum are not listed as two numbers"
    size, checksum = entry
    try:
        inner = pathlib.PurePath(name).parents
        if any((folder / parent).is_symlink() for parent in inner if parent.name):
            return "lies behind a symbolic link"
        with open(open_regular(folder / name), "rb") as file:
            actual = os.fstat(file.fileno()).st_size
            if actual != size:
                return f"has {actual} bytes, {size} were written"
            return None if _crc(file) == checksum else "its content was changed (the checksum differs)"
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError) as error:
        return f"cannot be read ({error})"


def _checksum(path: pathlib.Path) -> int:
    """Returns the CRC-32 of a file."""
    with open(path, "rb") as file:
        return _crc(file)


def _crc(file: Any) -> int:
    value = 0
    while chunk := file.read(_CHUNK):
        value = zlib.crc32(chunk, value)
    return value
