"""What a folder of checkpoints holds, read with care: which are complete, and what their documents say. Writes nothing.

Layout: `<folder>/<step>/` with Orbax's items `state` (arrays) and `extra` (arrays of callbacks, where there are any),
`meta.json`, `host.json`, and the list of files; `scores.json` may come later.
"""

import contextlib
import pathlib
from typing import Any

from trainkit.checkpoint._manifest import NAME as MANIFEST
from trainkit.checkpoint._manifest import problems, read_json

FOLDER = "checkpoints"
"""Name of the folder within a run's `logdir`."""

STATE, EXTRA = "state", "extra"
"""Names of Orbax's items."""

META, HOST, SCORES = "meta.json", "host.json", "scores.json"
"""Names of the documents in the folder of each checkpoint: what lists show, the rest of the run, what came later."""

WEIGHTS_ONLY = "weights_only"
"""Key in `META` where no run can be resumed from the checkpoint."""


def complete_steps(folder: pathlib.Path) -> list[int]:
    """Returns the steps of the complete checkpoints in `folder`, in order."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if is_checkpoint(path))


def is_checkpoint(path: pathlib.Path) -> bool:
    # Damaged ones count; a folder that somebody named 2024 does not.
    named = path.name.isdecimal() and path.name == str(int(path.name))
    return named and any((path / ours).exists() for ours in (META, HOST, MANIFEST))


def problems_of(folder: pathlib.Path, step: int) -> list[str]:
    """Returns what is wrong with a checkpoint, one line each."""
    path = folder / str(step)
    if path.is_symlink():
        return ["it is a symbolic link"]
    found = problems(path, items=(STATE,), documents=(META, HOST))
    if found:
        return found
    try:
        read_meta(folder, step)
        extra = read_host(folder, step)["extra"]
    except (OSError, ValueError) as error:
        return [str(error)]
    return problems(path, items=(EXTRA,)) if extra and not (path / EXTRA).is_dir() else []


def read_meta(folder: pathlib.Path, step: int) -> dict[str, Any]:
    """Returns the `meta` of a checkpoint, with the scores that came later.

    Raises:
        OSError, ValueError: it cannot be read, or is not as it was written.
    """
    path = folder / str(step)
    meta = read_json(path, META)
    if not _are_scores(meta.get("scores")):
        raise ValueError(f"{META}: has no scores by name")
    # Unreadable, they are no reason to refuse the checkpoint: nothing that is trained depends on them.
    with contextlib.suppress(OSError, ValueError):
        later = read_json(path, SCORES)
        meta["scores"] = {**meta["scores"], **(later if _are_scores(later) else {})}
    return meta


def read_host(folder: pathlib.Path, step: int) -> dict[str, Any]:
    """Returns the `host` of a checkpoint as `values`, and its `extra` as dtypes and shapes; raises as `read_meta`."""
    host = read_json(folder / str(step), HOST)
    if not isinstance(host.get("values"), dict) or not are_arrays(host.get("extra")):
        raise ValueError(f"{HOST}: has no values, or no arrays with a dtype and a shape each")
    return host


def are_arrays(specs: Any) -> bool:
    """Says whether `specs` names arrays, with a dtype and a shape each, as JSON has them."""
    return isinstance(specs, dict) and all(
        isinstance(spec, list)
        and len(spec) == 2
        and isinstance(spec[0], str)
        and isinstance(spec[1], list)
        and all(type(size) is int and size >= 0 for size in spec[1])
        for spec in specs.values()
    )


def _are_scores(scores: Any) -> bool:
    return isinstance(scores, dict) and all(type(value) in (int, float) for value in scores.values())


def read_scores(folder: pathlib.Path, step: int) -> dict[str, float]:
    try:
        return read_meta(folder, step)["scores"]
    except (OSError, ValueError):
        return {}
