"""The folder of the user in which trainkit keeps what all runs share: where it is, and whether it can be trusted.

Owns that folder; not what lies in it.
"""

import os
import pathlib
import stat


def user_cache() -> pathlib.Path:
    """Returns `$XDG_CACHE_HOME/trainkit`, by default `~/.cache/trainkit`; made where it is missing, with mode 0700.

    Raises:
        OSError: it can't be made, or someone else may have put something there.
    """
    folder = _base() / "trainkit"
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        status = folder.lstat()
        if stat.S_ISLNK(status.st_mode) or not stat.S_ISDIR(status.st_mode):
            raise _unusable(folder, "is no folder of its own but a link or a file") from None
        if status.st_uid != os.geteuid():
            raise _unusable(folder, "belongs to another user") from None
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise _unusable(folder, "may be written to by others (chmod go-w it)") from None
    return folder


def is_ours(status: os.stat_result) -> bool:
    """Says whether a file is one that only this user can have written."""
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _base() -> pathlib.Path:
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):  # the standard has others ignored
        base = pathlib.Path(given)
    else:
        home = pathlib.Path(os.path.expanduser("~"))
        if not home.is_absolute() or not home.is_dir():
            raise _unusable(home, "is the home of this user, and is not there")
        base = home / ".cache"
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    return base


def _unusable(path: pathlib.Path, why: str) -> OSError:
    return OSError(None, why, str(path))
