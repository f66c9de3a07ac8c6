"""Choices of earlier runs, beside the compilation cache of JAX. Owns the files; not the choosing."""

import hashlib
import json
import logging
import os
import pathlib

import jax
import jaxlib.version

from trainkit._atomic import write_atomic
from trainkit._choice import Choice
from trainkit._version import __version__

_LOG = logging.getLogger("trainkit")


def cache_folder() -> pathlib.Path | None:
    """Returns the folder of the persistent compilation cache, None where there is none on this machine."""
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
        if self._path is None or not self._path.is_file():
            return None
        try:
            return Choice.parse(json.loads(self._path.read_text())["choice"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def store(self, choice: Choice, measured: dict[str, float]) -> None:
        """Keeps `choice`, with the microseconds a step that were measured; a folder that refuses is no error."""
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self._path, json.dumps({"choice": str(choice), "measured": measured}).encode())
        except OSError as error:
            _LOG.info("the choice of calls could not be kept in %s: %s", self._path.parent, error)
