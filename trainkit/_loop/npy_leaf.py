"""One array as a `.npy` file whose first dimension grows: its head, its sizes, its name. Opens no file."""

import dataclasses
from typing import Any

import numpy as np

_MAGIC, _ALIGNED = b"\x93NUMPY\x01\x00", 64
_MOST_ROWS = 10**20


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array, whose first dimension grows.

    Attributes:
        name: its path, with slashes.
        dtype: of its elements; those of strings get wider as longer ones come.
        tail: the other dimensions.
    """

    name: str
    dtype: np.dtype[Any]
    tail: tuple[int, ...]

    def header(self, rows: int) -> bytes:
        """Returns the head of a file of so many rows, as long for any number of them."""
        descr = np.lib.format.dtype_to_descr(self.dtype)
        head, longest = (
            repr({"descr": descr, "fortran_order": False, "shape": (count, *self.tail)})
            for count in (rows, _MOST_ROWS)
        )
        size = -(-(len(_MAGIC) + 2 + len(longest) + 1) // _ALIGNED) * _ALIGNED
        room = size - len(_MAGIC) - 2
        return _MAGIC + room.to_bytes(2, "little") + head.ljust(room - 1).encode("latin1") + b"\n"

    def bytes(self, rows: int) -> int:
        """Returns the size of a file of so many rows."""
        return len(self.header(0)) + rows * int(np.prod(self.tail, dtype=np.int64)) * self.dtype.itemsize

    def as_json(self) -> list[Any]:
        """Returns it for the journal."""
        name = self.dtype.name if self.dtype.kind == "V" else self.dtype.str
        return [self.name, name, list(self.tail)]

    @classmethod
    def of_json(cls, value: Any) -> "Leaf":
        """Undoes `as_json`; raises ValueError or TypeError where it is something else."""
        name, dtype, tail = value
        check_name(name)
        return cls(name, np.dtype(dtype), tuple(int(size) for size in tail))


def check_name(name: str) -> None:
    """Refuses a path that would lie outside of the folder.

    Raises:
        ValueError: it would.
    """
    if any(part in ("", ".", "..") or "\0" in part for part in name.split("/")):
        raise ValueError(f"the leaf {name!r} can't be the name of a file; give it another.")
