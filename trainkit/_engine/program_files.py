"""Compiled programs as files, in the form of a cache of JAX: whole or absent, checked, bounded in size.

JAX's own file cache writes in place, so that what was broken off (a kill, a full disk) stays for ever; it checks
nothing where programs are compressed by zstandard; and it grows. Owns the files; not where they are, nor when they
are used.
"""

import contextlib
import functools
import hashlib
import logging
import os
import pathlib
import platform
import tempfile

import jax
from jax._src.compilation_cache_interface import CacheInterface

from trainkit._core.files import open_regular
from trainkit._engine.user_cache import is_ours

LARGEST = 2**30
"""Bytes that a folder holds at most; what was used longest ago makes room."""

_LOG = logging.getLogger("trainkit")
_SUFFIX = ".program"
_CHECKSUM = hashlib.sha256().digest_size
# File systems take 255 bytes.
_LONGEST_NAME = 200


class ProgramFiles(CacheInterface):
    """The compiled programs in one folder of the user's own. What can't be read or written is no error.

    A file is the SHA-256 of all that comes after it and of its key, then the program as JAX packs it.

    Args:
        folder: exists, and is the user's alone.
        largest: bytes that it holds at most.
    """

    def __init__(self, folder: pathlib.Path, largest: int = LARGEST) -> None:
        self._path = folder  # JAX names it in its log
        self._largest = largest
        self._told = False

    def get(self, key: str) -> bytes | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the program under `key`, None where there is none that is whole."""
        path = self._file(key)
        try:
            with open(open_regular(path), "rb") as file:
                if not is_ours(os.fstat(file.fileno())):
                    return None
                content = file.read()
                with contextlib.suppress(OSError):
                    os.utime(file.fileno())  # of a disk that can only be read, nothing is ever removed
        except OSError:
            return None
        checksum, program = content[:_CHECKSUM], content[_CHECKSUM:]
        if _checksum(key, program) == checksum:
            return program
        _LOG.warning("the compiled program in %s is damaged: it is compiled again.", path)
        with contextlib.suppress(OSError):
            path.unlink()
        return None

    def put(self, key: str, value: bytes) -> None:
        """Keeps a program under `key`, and removes what was used longest ago where the folder is too large."""
        if len(value) > self._largest:
            return
        try:
            self._write(self._file(key), _checksum(key, value) + value)
            self._prune()
        except OSError as error:
            if not self._told:
                _LOG.warning("compiled programs are not kept in %s: %s.", self._path, error)
            self._told = True

    def _file(self, key: str) -> pathlib.Path:
        # The end of a key is what tells it from others.
        return self._path / f"{key[-_LONGEST_NAME:]}{_machine()}{_SUFFIX}"

    def _write(self, path: pathlib.Path, content: bytes) -> None:
        # Renamed, so that others read all of it or nothing. Not synced: what a crash tears its checksum tells.
        handle, name = tempfile.mkstemp(prefix=".", dir=self._path)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise

    def _prune(self) -> None:
        """Removes files, oldest first. Everything counts: what XLA keeps here, and what a killed process left."""
        found: list[tuple[int, int, str]] = []
        for folder, _, names in os.walk(self._path):
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # another process removed it
                    status = os.lstat(path := os.path.join(folder, name))
                    found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._largest:
                return
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            total -= size


def _checksum(key: str, program: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\0" + program).digest()


@functools.cache
def _machine() -> str:
    """Returns what tells CPUs of other instructions apart, as JAX's key does not: one home may serve many machines."""
    if jax.default_backend() != "cpu":
        return ""
    features = [platform.machine()]
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        # "flags" on x86, "Features" on ARM; one processor stands for all.
        features += [line for line in file if line.lower().startswith(("flags", "features"))][:1]
    return f"-{hashlib.sha256(''.join(features).encode()).hexdigest()[:12]}"
