"""The list of a checkpoint's files with their sizes and checksums: tells a whole checkpoint from a damaged one.

Owns the list; not the format of the files, which is Orbax's.
"""

import concurrent.futures
import json
import os
import pathlib
import zlib

NAME = "trainkit_manifest.json"
"""The file, in the folder of the checkpoint."""

_CHUNK = 1 << 22
# Orbax writes the time of completion into it afterwards.
_CHANGES = "_CHECKPOINT_METADATA"


def write_manifest(folder: pathlib.Path) -> None:
    """Lists every file in `folder`, which nothing writes to any more."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != _CHANGES]
    entries = {str(path.relative_to(folder)): [path.stat().st_size, _checksum(path)] for path in files}
    with open(folder / NAME, "w", encoding="utf-8") as file:
        json.dump(entries, file)
        file.flush()
        os.fsync(file.fileno())


def problems(folder: pathlib.Path) -> list[str]:
    """Returns what is wrong with the files of a checkpoint, one line each; empty where it is whole."""
    entries, name = {}, NAME
    try:
        for name in (_CHANGES, NAME):
            entries = json.loads((folder / name).read_bytes())
            if not isinstance(entries, dict):
                raise ValueError("it is no list of files")
    except (OSError, ValueError) as error:
        return [f"{name}: cannot be read ({error})"]
    # Checksums are computed without Python's lock: files are read side by side.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = pool.map(lambda entry: _problem(folder / entry[0], *entry[1]), entries.items())
        return [f"{name}: {problem}" for name, problem in zip(entries, found, strict=True) if problem]


def _problem(path: pathlib.Path, size: int, checksum: int) -> str | None:
    try:
        actual = path.stat().st_size
        if actual != size:
            return f"has {actual} bytes, {size} were written"
        return None if _checksum(path) == checksum else "its content was changed (the checksum differs)"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error})"


def _checksum(path: pathlib.Path) -> int:
    """Returns the CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value
