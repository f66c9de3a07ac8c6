"""The writer of `metrics.jsonl`, one JSON object a line, and its reader. Owns what a line says, not how it is read."""

import logging
import math
import os
import pathlib
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from trainkit._core.files import check_regular, open_regular
from trainkit._core.typing import Clock
from trainkit.writers._alike import AlikeWriter, Kind
from trainkit.writers._file import Edit, RecordFile
from trainkit.writers._lines import MOST, Line, encoded, lines
from trainkit.writers._logdir import claim, release
from trainkit.writers._values import Complaints, Unwritable, as_number, describe, flat_hparams
from trainkit.writers._writer import Scalar

_KIND = "JSONL"
_NAME = "metrics.jsonl"
_LOG = logging.getLogger("trainkit")


class JsonlWriter(AlikeWriter):
    """Writes `logdir/metrics.jsonl`, which any tool that reads JSON lines can read.

    A line is `{"step": 10, "time": 1.7e9, "scalars": {"train/loss": 0.5}}`, or has `texts` in place of
    `scalars`, or is `{"time": 1.7e9, "hparams": {...}}`. Arrays (`images`, `histograms`, ...) are noted with
    their shape and dtype; their values are not kept. JSON has no NaN and no infinities: as scalars they are
    the strings `"NaN"`, `"Infinity"` and `"-Infinity"`, which `read_jsonl` turns back.

    The folder is made and checked at once, the file made by the first write. Lines are whole or absent, and
    with the operating system when the method returns, so a SIGKILL loses nothing. An existing file is
    continued: where it ends in a torn line, and where `purge_step` is given, lines that can't be read are taken out of
    it, with a warning in the log.

    Args:
        logdir: the run's folder, local.
        purge_step: int; lines from this step on are taken out of an existing file. A run resumed after step n
            passes n + 1.
        clock: seconds since 1970.

    Raises:
        OSError: the folder cannot be made or written to, or something else than a file is called `metrics.jsonl`.
        ValueError: the folder has a live JSONL writer in this process.

    Example:
        >>> import tempfile
        >>> writer = JsonlWriter(tempfile.mkdtemp())
        >>> writer.write_scalars(1, {"train/loss": 0.5})
        >>> writer.close()
    """

    def __init__(
        self, logdir: str | os.PathLike[str], *, purge_step: int | None = None, clock: Clock = time.time
    ) -> None:
        self._clock = clock
        self._complaints = Complaints(type(self).__name__)
        self._file: RecordFile | None = None
        self._closed = False
        self._logdir = claim(logdir, _KIND, self)
        try:
            _repair(self._logdir / _NAME, purge_step)
        except BaseException:
            release(self._logdir, _KIND, self)
            raise

    def write_scalars(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        """Writes numbers as one line; integers stay exact."""
        numbers = {}
        for name, value in scalars.items():
            try:
                numbers[name] = _encoded(as_number(value))
            except Unwritable as error:
                self._complaints.once("scalar", name, str(error))
        self._note(step, "scalars", numbers)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes texts as one line."""
        self._note(step, "texts", {name: str(text) for name, text in texts.items()})

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes the hyperparameters as one line without a step."""
        values = {name: _encoded(value) for name, value in flat_hparams(hparams).items()}
        self._append({"time": self._clock(), "hparams": values})

    def rewind(self, step: int, names: Collection[str]) -> None:
        """Takes the lines after `step` out of the file, and at `step` all names but `names`."""
        if self._file is not None:
            self._file.close()
            self._file = None
        _rewind(self._logdir / _NAME, step, names)

    def flush(self) -> None:
        """Does nothing: every line has reached the operating system already."""

    def close(self) -> None:
        """Closes the file and frees the folder."""
        self._closed = True
        release(self._logdir, _KIND, self)
        if self._file is not None:
            self._file.close()

    def _write(self, kind: Kind, step: int, values: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Notes the shapes and dtypes of arrays."""
        key = "pointclouds" if kind == "pointcloud" else kind
        self._note(step, key, {name: describe(value) for name, value in values.items()})

    def _note(self, step: int, key: str, values: dict[str, Any]) -> None:
        if values:
            self._append({"step": int(step), "time": self._clock(), key: values})

    def _append(self, entry: dict[str, Any]) -> None:
        if self._closed:
            raise ValueError(
                f"{type(self).__name__} for {str(self._logdir)!r} is closed; make a new one to write more."
            )
        line = encoded(entry)
        if len(line) > MOST:
            what = next(key for key in entry if key not in ("step", "time"))
            name = next(iter(entry[what]))
            self._complaints.once(what, name, f"not written: a line of more than {MOST >> 20} MiB")
            return
        if self._file is None:
            self._file = RecordFile(self._logdir / _NAME)
        self._file.append(line)


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the lines that a `JsonlWriter` wrote.

    Args:
        path: the file.

    Returns:
        The lines in order; in `scalars`, NaN and the infinities are floats again. A last line cut short, as a
        crash of the machine leaves it, is left out.

    Raises:
        ValueError: another line is none that a `JsonlWriter` writes; the message names it.
        OSError: `path` is missing, or is no file.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> writer = JsonlWriter(folder, clock=lambda: 0.0)
        >>> writer.write_scalars(1, {"train/loss": float("nan")})
        >>> writer.close()
        >>> read_jsonl(f"{folder}/metrics.jsonl")
        [{'step': 1, 'time': 0.0, 'scalars': {'train/loss': nan}}]
    """
    entries = []
    with open(open_regular(os.path.realpath(path)), "rb") as file:
        for line in lines(file):
            if line.entry is not None:
                entries.append(line.entry)
            elif line.ended:
                raise ValueError(
                    f"{os.fspath(path)!r}: line {line.number} {line.problem}. Only the last line may be cut short; "
                    "take the line out, or move the file away."
                )
    for entry in entries:
        if "scalars" in entry:
            entry["scalars"] = {name: _decoded(value) for name, value in entry["scalars"].items()}
    return entries


def _encoded(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _decoded(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value


def _repair(path: pathlib.Path, purge_step: int | None) -> None:
    """Takes a torn last line and the lines from `purge_step` on out of an existing file."""
    check_regular(path, missing_ok=True)
    if not path.exists() or (purge_step is None and _ends_whole(path)):
        return
    _edit(path, lambda entry: entry if purge_step is None or entry.get("step", -1) < purge_step else None)


def _rewind(path: pathlib.Path, step: int, names: Collection[str]) -> None:
    def change(entry: dict[str, Any]) -> dict[str, Any] | None:
        # The hyperparameters stand at the start of the run, as TensorBoard has them.
        at = entry.get("step", 0 if "hparams" in entry else -1)
        if at > step:
            return None
        if at != step:
            return entry
        kinds = {
            kind: {name: value for name, value in entry[kind].items() if name in names}
            for kind in entry.keys() - {"step", "time"}
        }
        return {**entry, **kinds} if any(kinds.values()) else None

    check_regular(path, missing_ok=True)
    if path.exists():
        _edit(path, change)


def _edit(path: pathlib.Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Puts what `change` makes of each line into a file; lines that can't be read are taken out and told."""
    edit, kept, problems, first = Edit(), 0, 0, ""
    with open(open_regular(path), "rb") as file:
        for line in lines(file):
            try:
                kept += _put(edit, line, change)
            except ValueError as error:
                problems, first = problems + 1, first or f"line {line.number} {error}"
        edit.apply(file, path)
    if problems:
        more = f", and {problems - 1} more" if problems > 1 else ""
        _LOG.warning(
            "%s is damaged: %s%s; what can't be read is taken out, %d lines stay.", path, first, more, kept
        )


def _put(edit: Edit, line: Line, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> bool:
    """Puts what `change` makes of a line into an edit, and says whether anything stays; raises where none can be."""
    if line.entry is None:
        raise ValueError(line.problem)
    new = change(line.entry)
    if new is line.entry and line.ended:
        edit.keep(line.start, line.stop)
    elif new is not None:
        try:
            edit.put(encoded(new))
        except ValueError as error:  # 1e999, which JSON has and floats have not
            raise ValueError(f"can't be written again ({error})") from None
    return new is not None


def _ends_whole(path: pathlib.Path) -> bool:
    with open(open_regular(path), "rb") as file:
        if not file.seek(0, os.SEEK_END):
            return True
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"
