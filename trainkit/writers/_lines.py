"""The lines of `metrics.jsonl` as they are read back. Owns what is believed of a file that others may have changed."""

import json
import math
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

MOST = 1 << 24
"""Bytes of the longest line that is written or read: as objects of Python, JSON takes up to thirty times its length."""

_NOT_FINITE = ("NaN", "Infinity", "-Infinity")


class Line(NamedTuple):
    """One line.

    Attributes:
        number: counted from 1.
        start: where it begins, in bytes.
        stop: where the next begins.
        ended: whether a newline ends it: the last line of a file may be cut short.
        entry: what it says, None where that is nothing a `JsonlWriter` writes.
        problem: why, in words that follow "line 3".
    """

    number: int
    start: int
    stop: int
    ended: bool
    entry: dict[str, Any] | None
    problem: str


def lines(file: BinaryIO) -> Iterator[Line]:
    """Yields the lines of a file that are not empty; one is held at a time, and no more than `MOST` bytes of it."""
    start = stop = number = 0
    while content := file.readline(MOST + 1):
        start, stop, number = stop, stop + len(content), number + 1
        short, rest = len(content) <= MOST, content
        while not rest.endswith(b"\n") and (rest := file.readline(MOST)):
            short, stop = False, stop + len(rest)
        ended = content.endswith(b"\n") if short else rest.endswith(b"\n")
        if short and not content.strip():
            continue
        entry, problem = None, f"is longer than {MOST >> 20} MiB"
        if short:
            try:
                entry, problem = decoded(content), ""
            except ValueError as error:
                problem = str(error)
        yield Line(number, start, stop, ended, entry, problem)


def encoded(entry: dict[str, Any]) -> bytes:
    """Returns the line that says `entry`."""
    return json.dumps(entry, allow_nan=False, separators=(", ", ": ")).encode() + b"\n"


def decoded(line: bytes) -> dict[str, Any]:
    """Returns what a line says.

    Raises:
        ValueError: it is none that a `JsonlWriter` writes.
    """
    try:
        # Not from bytes, of which `json` guesses the encoding; and without its NaN, which JSON has not.
        entry = json.loads(line.decode(), parse_constant=_refused)
    except ValueError as error:
        raise ValueError(f"is not JSON ({error})") from None
    except RecursionError:
        raise ValueError("is not JSON of ours (it is nested too deeply)") from None
    if not isinstance(entry, dict):
        raise ValueError("is not a JSON object")
    step, moment = entry.get("step", 0), entry.get("time", 0)
    if not isinstance(step, int) or isinstance(step, bool):
        raise ValueError(f"has a step that is no integer but {type(step).__name__}")
    if not _is_number(moment):
        raise ValueError("has a time that is no number")
    for key, value in entry.items():
        if key not in ("step", "time") and not isinstance(value, dict):
            raise ValueError(f"has {key[:40]!r} that is no object")
    for name, value in entry.get("scalars", {}).items():
        if value not in _NOT_FINITE and not _is_number(value):
            raise ValueError(f"has the scalar {name[:40]!r} that is no number")
    return entry


def _is_number(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _refused(constant: str) -> float:
    raise ValueError(f"it has the constant {constant}")
