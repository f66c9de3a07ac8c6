"""`History`: every scalar a run logged, by name. Filled by the loop's writer; owns no file."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


class History(Mapping[str, list[tuple[int, float]]]):
    """The scalars of a run: `history["eval/loss"]` is a list of `(step, value)` pairs in order of steps.

    Example:
        >>> history = History()
        >>> history.append(10, {"train/loss": 0.5})
        >>> history["train/loss"], history.last("train/loss")
        ([(10, 0.5)], 0.5)
    """

    def __init__(self) -> None:
        self._series: dict[str, list[tuple[int, float]]] = {}

    def append(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds values at `step`, updates completed."""
        for name, value in scalars.items():
            self._series.setdefault(name, []).append((step, float(value)))

    def __getitem__(self, name: str) -> list[tuple[int, float]]:
        if name not in self._series:
            raise KeyError(
                f"nothing was logged as {name!r}; the names are {', '.join(sorted(self._series)) or 'none'}"
            )
        return list(self._series[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._series)

    def __len__(self) -> int:
        return len(self._series)

    def __contains__(self, name: object) -> bool:
        return name in self._series

    def last(self, name: str) -> float:
        """Returns the newest value of `name`."""
        return self[name][-1][1]

    def state_dict(self) -> dict[str, Any]:
        """Returns the steps, int64[n], and values, float64[n], of each name."""
        return {
            name: {
                "steps": np.array([step for step, _ in pairs], np.int64),
                "values": np.array([value for _, value in pairs], np.float64),
            }
            for name, pairs in self._series.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Becomes what `state_dict` was called on."""
        self._series = {
            name: list(zip(series["steps"].tolist(), series["values"].tolist(), strict=True))
            for name, series in state.items()
        }

    def to_rows(self) -> list[dict[str, Any]]:
        """Returns one dict a step, in order: `{"step": 10, "train/loss": 0.5, ...}` with what was logged there."""
        rows: dict[int, dict[str, Any]] = {}
        for name, pairs in self._series.items():
            for step, value in pairs:
                rows.setdefault(step, {"step": step})[name] = value
        return [rows[step] for step in sorted(rows)]

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Returns columns of equal length `n`: `"step"` as int64[n], each name as float64[n], NaN where absent."""
        rows = self.to_rows()
        columns = {name: np.array([row.get(name, np.nan) for row in rows], np.float64) for name in self}
        return {"step": np.array([row["step"] for row in rows], np.int64), **columns}

    def __repr__(self) -> str:
        return f"History({', '.join(f'{name}: {len(pairs)}' for name, pairs in self._series.items())})"
