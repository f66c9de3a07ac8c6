"""What checkpoints a run has, for people. Reads only."""

import dataclasses
import datetime
import os
import pathlib
from typing import Any

from trainkit.checkpoint._reading import FOLDER, META, WEIGHTS_ONLY, complete_steps, problems_of, read_meta


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """One complete checkpoint.

    Attributes:
        step: updates completed.
        path: its folder.
        time: when it was saved.
        bytes: on disk.
        scores: metrics of the evaluation at its step, by full name, where it was ranked.
        metadata: what the user gave `Checkpoint(metadata=...)`.
        problems: what is wrong with its files, one line each; empty where nothing is, or nobody looked.
        weights_only: whether it was saved by `Checkpoint(weights_only=True)`, and no run can be resumed from it.
    """

    step: int
    path: pathlib.Path
    time: datetime.datetime
    bytes: int
    scores: dict[str, float]
    metadata: dict[str, Any] = dataclasses.field(repr=False)
    problems: tuple[str, ...] = ()
    weights_only: bool = False


def list_checkpoints(path: str | os.PathLike[str]) -> list[CheckpointInfo]:
    """Returns the complete checkpoints of a run in order of steps, without reading their arrays.

    Args:
        path: the `logdir`, or its folder of checkpoints.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folder = _folder(path)
    return [_info(folder, step) for step in complete_steps(folder)]


def verify(path: str | os.PathLike[str]) -> list[CheckpointInfo]:
    """Returns the checkpoints of a run as `list` does, each of its files read and compared with its checksum.

    Args:
        path: the `logdir`, or its folder of checkpoints.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folder = _folder(path)
    return [
        dataclasses.replace(info, problems=tuple(problems_of(folder, info.step)))
        for info in list_checkpoints(folder)
    ]


def _folder(path: str | os.PathLike[str]) -> pathlib.Path:
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {os.fspath(path)!r}; give the logdir of a run.")
    return folder / FOLDER if (folder / FOLDER).is_dir() else folder


def _info(folder: pathlib.Path, step: int) -> CheckpointInfo:
    path = folder / str(step)
    size = sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
    try:
        meta = read_meta(folder, step)
        when = datetime.datetime.fromtimestamp(meta["time"]).astimezone()
        scores, metadata = meta["scores"], dict(meta["metadata"])
        return CheckpointInfo(step, path, when, size, scores, metadata, (), bool(meta.get(WEIGHTS_ONLY)))
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        when = datetime.datetime.fromtimestamp(path.lstat().st_mtime).astimezone()
        return CheckpointInfo(step, path, when, size, {}, {}, (f"{META}: cannot be read ({error})",))
