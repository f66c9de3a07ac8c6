"""What a run left in its folder of logs. Owns which files those are; opens none."""

import pathlib

from trainkit._core.files import remove
from trainkit.writers._projector import remove_embeddings

_LOGS = ("metrics.jsonl", "*tfevents*.trainkit")
_HALF_DONE = (".rewrite-*", ".part-*")


def logs_in(logdir: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files that trainkit's own writers left in a folder, in order of their names."""
    return sorted(path for pattern in _LOGS for path in logdir.glob(pattern))


def remove_logs(logdir: pathlib.Path) -> None:
    """Removes them, and what a killed process left half done.

    Raises:
        OSError: the system refused it.
    """
    for path in [*logs_in(logdir), *(path for pattern in _HALF_DONE for path in logdir.glob(pattern))]:
        if not path.is_dir() or path.is_symlink():
            remove(path)
    remove_embeddings(logdir)
