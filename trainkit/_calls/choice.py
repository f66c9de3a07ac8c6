"""How the steps of a fit are put into calls: `Choice`, a value with a short text form, and where it is remembered.

Owns that value and its files; no call, and not the choosing.
"""

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
from typing import Self

import jax
import jaxlib.version

from trainkit._core.atomic import write_atomic
from trainkit._core.files import check_regular, read_regular
from trainkit._version import __version__

KINDS = ("single", "unrolled", "scanned")
SCHEDULERS = ("default", "memory")
_MOST_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class Choice:
    """How training steps are dispatched.

    Attributes:
        kind: `"single"`, one step a call; `"unrolled"`, `size` steps one after another in one program;
            `"scanned"`, up to `size` of them in a loop on the device.
        size: most steps of one call; 1 for `"single"`.
        scheduler: of XLA on the CPU: `"default"`, or `"memory"` for the one that minimises memory.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> str(Choice("scanned", 50, "memory")), Choice.parse("unrolled 4")
        ('scanned 50 memory', Choice(kind='unrolled', size=4, scheduler='default'))
    """

    kind: str = "single"
    size: int = 1
    scheduler: str = "default"

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.scheduler not in SCHEDULERS:
            raise ValueError(f"{self!r}: kind must be one of {KINDS}, scheduler one of {SCHEDULERS}.")
        if not isinstance(self.size, int) or self.size < 1 or (self.kind == "single") != (self.size == 1):
            raise ValueError(f"{self!r}: size is 1 for 'single', and an int of at least 2 for the others.")

    def __str__(self) -> str:
        words = [self.kind, str(self.size) if self.size > 1 else "", self.scheduler.replace("default", "")]
        return " ".join(filter(None, words))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Returns the choice whose `str` is `text`.

        Raises:
            ValueError: there is none.
        """
        kind, *rest = text.split()
        scheduler = rest.pop() if rest and rest[-1] in SCHEDULERS else "default"
        if len(rest) > 1 or not all(word.isdecimal() for word in rest):
            raise ValueError(
                f"{text!r} is no choice; expected e.g. 'single', 'unrolled 4' or 'scanned 50 memory'."
            )
        return cls(kind, int(rest[0]) if rest else 1, scheduler)

    @classmethod
    def recall(cls, text: object) -> Self | None:
        """Returns the choice whose `str` is `text`, as it was read from a file; None where there is none."""
        try:
            return cls.parse(text) if isinstance(text, str) else None
        except ValueError:
            return None

    def room(self, left: float, *, any_size: bool) -> int:
        """Returns how many steps the next call takes when `left` steps may run before the host has anything to do.

        It depends on nothing else, so a run that was resumed where a call ended makes the same calls.

        Args:
            left: steps, at least 1; may be infinite.
            any_size: whether a scanned call may be shorter than `size`.
        """
        if self.kind == "scanned" and any_size:
            return int(min(left, self.size))
        return self.size if left >= self.size else 1


SINGLE = Choice()
"""One step a call, compiled as JAX does by default: the reference."""

_LOG = logging.getLogger("trainkit")


def cache_folder() -> pathlib.Path | None:
    """Returns the folder of the persistent compilation cache, None where there is none on this machine.

    During a fit that is the user's, see `compile_cache`, unless JAX was given another.
    """
    folder: str | None = getattr(jax.config, "jax_compilation_cache_dir", None)
    return None if not folder or "://" in folder else pathlib.Path(folder)


class Remembered:
    """The choice made for one step on one kind of machine.

    Args:
        folder: where the file is, None to remember nothing.
        text: the step, as StableHLO.
        machine: what else the choice depends on, e.g. the kind of the device.
    """

    def __init__(self, folder: pathlib.Path | None, text: str, *machine: str) -> None:
        parts = (
            text,
            *machine,
            str(os.cpu_count()),
            jax.__version__,
            jaxlib.version.__version__,
            __version__,
        )
        key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
        self._path = None if folder is None else folder / f"trainkit-call-{key}.json"

    def load(self) -> Choice | None:
        """Returns the choice, None where there is none that can be read."""
        if self._path is None:
            return None
        try:
            kept = json.loads(read_regular(self._path, _MOST_BYTES))
        except (OSError, ValueError, RecursionError):
            return None
        return Choice.recall(kept.get("choice")) if isinstance(kept, dict) else None

    def store(self, choice: Choice, measured: dict[str, float]) -> None:
        """Keeps `choice`, with the microseconds a step that were measured; a folder that refuses is no error."""
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            check_regular(self._path, missing_ok=True)
            write_atomic(self._path, json.dumps({"choice": str(choice), "measured": measured}).encode())
        except OSError as error:
            _LOG.info("the choice of calls could not be kept in %s: %s", self._path.parent, error)
