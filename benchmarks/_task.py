"""What goes between the process that measures and those that are measured: NumPy only, for any interpreter."""

import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Task(NamedTuple):
    """What a contestant works on.

    Attributes:
        name: of the workload, e.g. "W1".
        arrays: the data, `[examples, ...]`.
        options: plain values: `batch_size`, the sizes of the model.
    """

    name: str
    arrays: dict[str, np.ndarray]
    options: dict[str, Any]

    def save(self, folder: pathlib.Path) -> None:
        """Writes it into `folder`, which is made."""
        folder.mkdir(parents=True)
        np.savez(folder / "arrays.npz", **self.arrays)
        (folder / "task.json").write_text(json.dumps({"name": self.name, "options": self.options}))

    @classmethod
    def load(cls, folder: pathlib.Path) -> "Task":
        """Reads what `save` wrote."""
        with np.load(folder / "arrays.npz") as held:
            arrays = dict(held)
        return cls(arrays=arrays, **json.loads((folder / "task.json").read_text()))


class Running(NamedTuple):
    """A contestant, set up.

    Attributes:
        run: trains for so many more steps and returns how many they were, when all of it is done.
        params: returns the parameters as nested dicts, None where they compare with nobody's.
        notes: returns what is worth knowing about how it ran, by name.
    """

    run: Callable[[int], int]
    params: Callable[[], Any] = lambda: None
    notes: Callable[[], dict[str, Any]] = dict


Make = Callable[[Task, str], Running]
"""The one signature of all contestants: `make(task, tmp) -> Running`."""
