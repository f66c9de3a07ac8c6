"""Arrays that grow on the disk: one `.npy` file each in a folder, and a journal of what is whole in them.

Owns the files and what of them is trusted; not what is written to them. The rows of a batch are written to every file,
then the journal says so, with a checksum of all before: what a killed process left behind its last line is cut off, and
a file that is not as the journal says is written anew. A file has its name once all is there.
"""

import dataclasses
import fcntl
import json
import os
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainkit._core.atomic import sync_folder
from trainkit._core.files import check_regular, open_regular, remove
from trainkit._loop.npy_leaf import Leaf, check_name

JOURNAL = "predictions.jsonl"
"""The file that says what is whole in the others."""

_SUFFIX, _GROWING = ".npy", ".npy.part"
_BEGINS = b'{"for": '
_CHUNK = 1 << 24


@dataclasses.dataclass
class _Journal:
    """What a journal says, as far as it is whole."""

    made_for: Any = None
    leaves: tuple[Leaf, ...] = ()
    batches: int = 0
    rows: int = 0
    checksums: tuple[int, ...] = ()
    complete: bool = False
    size: int = 0  # of its whole lines


class NpyFiles:
    """The files of one prediction.

    Args:
        folder: made where it is missing.
        made_for: JSON that tells what is predicted: other predictions in the folder are replaced.
        leaves: in the order in which `write` gets them.

    Attributes:
        batches: how many were whole when it was opened.

    Raises:
        ValueError: the folder holds a file of that name that is of something else, or another prediction writes to it.
        OSError: the folder can't be written to.
    """

    def __init__(self, folder: pathlib.Path, made_for: Any, leaves: Sequence[Leaf]) -> None:
        self._folder, self._journal_path = folder.absolute(), folder.absolute() / JOURNAL
        for leaf in leaves:
            check_name(leaf.name)
        names = [leaf.name for leaf in leaves]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"two leaves would be written to {twice[0]}{_SUFFIX}; give one another name.")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._files: list[Any] = []
        begun = not os.path.lexists(self._journal_path)
        self._journal = self._open_journal()
        try:
            old = self._read_journal()
            if old is not None and old.made_for == made_for and self._is_as_it_says(old, leaves):
                self._said = old
            else:
                self._clear(old, leaves)
                self._said = _Journal(made_for, tuple(leaves))
        except BaseException:
            if begun:
                self._journal_path.unlink()
            self._journal.close()
            raise
        self.batches = self._said.batches

    @property
    def complete(self) -> bool:
        """Whether all was written."""
        return self._said.complete

    def write(self, arrays: Sequence[np.ndarray]) -> None:
        """Writes the rows of one batch; they are whole once this returned.

        Args:
            arrays: `[rows, ...]`, in the order of the leaves.

        Raises:
            ValueError: one is of another form than in the batches before.
        """
        self._open()
        said = self._said
        rows = len(arrays[0])
        for index, array in enumerate(arrays):
            if len(array) != rows:
                raise ValueError(
                    f"the leaf {said.leaves[index].name!r} has {len(array)} rows in a batch, and "
                    f"{said.leaves[0].name!r} has {rows}: there must be one row an example."
                )
            self._make_room(index, array)
        checksums = []
        for leaf, file, array, checksum in zip(
            self._said.leaves, self._files, arrays, said.checksums, strict=True
        ):
            content = np.ascontiguousarray(array, leaf.dtype).tobytes()
            file.write(content)
            file.flush()
            checksums.append(zlib.crc32(content, checksum))
        self._said = dataclasses.replace(
            self._said, batches=said.batches + 1, rows=said.rows + rows, checksums=tuple(checksums)
        )
        self._note({"batches": self._said.batches, "rows": self._said.rows, "checksums": checksums})

    def finish(self) -> dict[str, np.ndarray]:
        """Gives the files their names; returns them as memory maps by the names of the leaves."""
        if not self._said.complete:
            self._open()
            for leaf, file in zip(self._said.leaves, self._files, strict=True):
                file.seek(0)
                file.write(leaf.header(self._said.rows))
                file.flush()
                os.fsync(file.fileno())
            for leaf in self._said.leaves:
                os.replace(self._growing(leaf), self._path(leaf))
                sync_folder(self._path(leaf).parent)
            self._note({"complete": True})
            os.fsync(self._journal.fileno())
        self.close()
        return {leaf.name: self._mapped(leaf) for leaf in self._said.leaves}

    def close(self) -> None:
        """Closes the files; what was written stays."""
        for file in [*self._files, self._journal]:
            file.close()
        self._files = []

    # ----------------------------------------------------------------------------------------------------------

    def _path(self, leaf: Leaf) -> pathlib.Path:
        return self._folder / f"{leaf.name}{_SUFFIX}"

    def _growing(self, leaf: Leaf) -> pathlib.Path:
        return self._folder / f"{leaf.name}{_GROWING}"

    def _mapped(self, leaf: Leaf) -> np.ndarray:
        shape = (self._said.rows, *leaf.tail)
        if not np.prod(shape, dtype=np.int64) or not leaf.dtype.itemsize:
            return np.zeros(shape, leaf.dtype)  # the system maps no empty range
        return np.memmap(self._path(leaf), leaf.dtype, "r", len(leaf.header(0)), shape)

    def _open(self) -> None:
        """Opens the files where the last whole batch ends."""
        if self._files:
            return
        self._journal.truncate(self._said.size)
        self._journal.seek(0, os.SEEK_END)
        if not self._said.size:
            # First of all the names: a file that the journal does not name is nobody's.
            self._note({"for": self._said.made_for, "leaves": [leaf.as_json() for leaf in self._said.leaves]})
            self._said.checksums = (0,) * len(self._said.leaves)
        elif self._said.complete:
            self._note({"complete": False})
        for leaf in self._said.leaves:
            path = self._growing(leaf)
            path.parent.mkdir(parents=True, exist_ok=True)
            if self._path(leaf).exists():
                os.replace(self._path(leaf), path)
            remove(_wide(path))
            file = os.fdopen(open_regular(path, os.O_RDWR | os.O_CREAT), "r+b")
            self._files.append(file)
            if not self._said.batches:
                file.truncate(0)
                file.write(leaf.header(0))
            file.truncate(leaf.bytes(self._said.rows))
            file.seek(0, os.SEEK_END)

    def _open_journal(self) -> Any:
        """Returns the journal, which this process alone has until it is closed."""
        file = os.fdopen(open_regular(self._journal_path, os.O_RDWR | os.O_CREAT), "r+b")
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(
                f"another prediction is being written to {os.fspath(self._folder)!r}: give each a folder of its own."
            ) from None
        if not _BEGINS.startswith(file.read(len(_BEGINS))):
            file.close()
            raise ValueError(
                f"{os.fspath(self._journal_path)!r} is there, and was not written by predict. Give out= another "
                "folder, or move it away."
            )
        return file

    def _note(self, line: dict[str, Any]) -> None:
        content = json.dumps(line).encode() + b"\n"
        self._journal.write(content)
        self._journal.flush()
        self._said.size += len(content)
        self._said.complete = bool(line.get("complete", False))

    def _make_room(self, index: int, array: np.ndarray) -> None:
        """Sees to it that the elements of a file are as wide as those of `array`."""
        leaf = self._said.leaves[index]
        both = leaf.dtype.kind + array.dtype.kind
        if array.shape[1:] != leaf.tail or (both not in ("UU", "SS") and array.dtype != leaf.dtype):
            raise ValueError(
                f"the leaf {leaf.name!r} was {leaf.dtype}{list(leaf.tail)} a row in the batches before, and is "
                f"{array.dtype}{list(array.shape[1:])} now: an array has one form. Give every batch the same."
            )
        if array.dtype.itemsize <= leaf.dtype.itemsize:
            return
        self._widen(index, dataclasses.replace(leaf, dtype=array.dtype))

    def _widen(self, index: int, wide: Leaf) -> None:
        narrow, old, said = self._said.leaves[index], self._files[index], self._said
        path, checksum, left = self._growing(narrow), 0, said.rows * int(np.prod(narrow.tail, dtype=np.int64))
        new = os.fdopen(open_regular(_wide(path), os.O_RDWR | os.O_CREAT), "r+b")
        new.truncate(0)
        new.write(wide.header(0))
        old.seek(len(narrow.header(0)))
        while left:
            count = min(left, max(1, _CHUNK // wide.dtype.itemsize))
            part = np.frombuffer(old.read(count * narrow.dtype.itemsize), narrow.dtype)
            content = part.astype(wide.dtype).tobytes()
            new.write(content)
            checksum = zlib.crc32(content, checksum)
            left -= count
        new.flush()
        old.close()
        os.replace(_wide(path), path)
        self._files[index] = new
        said.leaves = (*said.leaves[:index], wide, *said.leaves[index + 1 :])
        said.checksums = (*said.checksums[:index], checksum, *said.checksums[index + 1 :])
        leaves = [leaf.as_json() for leaf in said.leaves]
        self._note({"leaves": leaves, "checksums": list(said.checksums)})

    def _read_journal(self) -> _Journal | None:
        """Returns what the journal says, None where there is none that can be read."""
        said = _Journal()
        self._journal.seek(0)
        try:
            for number, line in enumerate(self._journal):
                if not line.endswith(b"\n"):
                    break  # it was being written
                _take(said, json.loads(line), first=number == 0)
                said.size += len(line)
        except (ValueError, TypeError, KeyError):
            pass
        return said if said.leaves else None

    def _is_as_it_says(self, said: _Journal, leaves: Sequence[Leaf]) -> bool:
        """Says whether the files hold what the journal says, of the same leaves."""
        if not said.batches or len(said.checksums) != len(said.leaves):
            return False
        form = [(leaf.name, leaf.dtype.kind, leaf.tail) for leaf in leaves]
        if [(leaf.name, leaf.dtype.kind, leaf.tail) for leaf in said.leaves] != form:
            return False
        if any(
            kept.dtype != leaf.dtype and kept.dtype.kind not in "US"
            for kept, leaf in zip(said.leaves, leaves, strict=True)
        ):
            return False
        try:
            return all(
                self._holds(leaf, said, checksum)
                for leaf, checksum in zip(said.leaves, said.checksums, strict=True)
            )
        except OSError:
            return False

    def _holds(self, leaf: Leaf, said: _Journal, checksum: int) -> bool:
        path = self._path(leaf) if self._path(leaf).exists() else self._growing(leaf)
        with os.fdopen(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if said.complete:  # synced before it was said
                return path == self._path(leaf) and size == leaf.bytes(said.rows)
            left = leaf.bytes(said.rows) - file.seek(len(leaf.header(0)))
            found = 0
            while left and (content := file.read(min(left, _CHUNK))):
                found = zlib.crc32(content, found)
                left -= len(content)
            return not left and found == checksum

    def _clear(self, old: _Journal | None, leaves: Sequence[Leaf]) -> None:
        """Removes what an earlier prediction wrote; refuses to replace anything else."""
        ours = set() if old is None else {leaf.name for leaf in old.leaves}
        for leaf in leaves:
            for path in (self._path(leaf), self._growing(leaf)):
                if leaf.name not in ours and os.path.lexists(path):
                    raise ValueError(
                        f"{os.fspath(path)!r} is there, and was not written by predict: it would be replaced. Give "
                        "out= another folder, or move it away."
                    )
        for leaf in () if old is None else old.leaves:
            for path in (self._path(leaf), self._growing(leaf), _wide(self._growing(leaf))):
                check_regular(path, missing_ok=True)
                remove(path)
        self._journal.truncate(0)


def _wide(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.wide")


def _take(said: _Journal, line: dict[str, Any], *, first: bool) -> None:
    """Takes in one line of a journal; raises ValueError, TypeError or KeyError where it is none."""
    if first:
        said.made_for = line["for"]
    if "leaves" in line:
        said.leaves = tuple(map(Leaf.of_json, line["leaves"]))
    said.batches = int(line.get("batches", said.batches))
    said.rows = int(line.get("rows", said.rows))
    said.checksums = tuple(int(one) for one in line.get("checksums", said.checksums))
    said.complete = bool(line.get("complete", False))
