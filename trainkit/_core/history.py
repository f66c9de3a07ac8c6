"""`History`: the scalars a run logged, by name. Filled by the loop's writer; owns no file."""

from array import array
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

_MOST_VALUES = 2**20
_Series = tuple["array[int]", "array[float]"]


class History(Mapping[str, list[tuple[int, float]]]):
    """The scalars of a run: `history["eval/loss"]` is a list of `(step, value)` pairs in order of steps.

    Each value takes 16 bytes. Of a name that was logged more than 2**20 times the oldest values are let go, so that
    no run, however long, fills the memory; in the log folder they stay.

    Example:
        >>> history = History()
        >>> history.append(10, {"train/loss": 0.5})
        >>> history["train/loss"], history.last("train/loss")
        ([(10, 0.5)], 0.5)
    """

    def __init__(self) -> None:
        self._series: dict[str, _Series] = {}

    def append(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds values at `step`, updates completed."""
        for name, value in scalars.items():
            steps, values = self._series.setdefault(name, _series([], []))
            steps.append(step)
            values.append(float(value))
            if len(steps) > _MOST_VALUES:
                # Several at a time, since all that stay are moved.
                del steps[: _MOST_VALUES // 4], values[: _MOST_VALUES // 4]

    def __getitem__(self, name: str) -> list[tuple[int, float]]:
        return list(zip(*self._named(name), strict=True))

    def __iter__(self) -> Iterator[str]:
        return iter(self._series)

    def __len__(self) -> int:
        return len(self._series)

    def __contains__(self, name: object) -> bool:
        return name in self._series

    def shown(self) -> "History":
        """Returns a view of this history, as it is at any time, through which it can't be changed."""
        return _Shown(self)

    def last(self, name: str) -> float:
        """Returns the newest value of `name`."""
        return self._named(name)[1][-1]

    def best(self, name: str, mode: str) -> tuple[int, float] | None:
        """Returns step and value of the best of `name`, of equal ones the first; None where no value is a number.

        Args:
            name: in the log.
            mode: "min" where less is better, "max" where more is.
        """
        if mode not in ("min", "max"):
            raise ValueError(f'mode={mode!r}: the choices are "min" and "max".')
        steps, values = self._named(name)
        found = np.array(values, np.float64)
        numbers = ~np.isnan(found)
        if not numbers.any():
            return None
        at = int(np.argmin(np.where(numbers, found if mode == "min" else -found, np.inf)))
        return steps[at], values[at]

    def rewind(self, step: int) -> None:
        """Forgets what was logged after `step`, and names under which nothing is left."""
        series = {}
        for name, (steps, values) in self._series.items():
            kept = [index for index, at in enumerate(steps) if at <= step]
            if kept:
                series[name] = _series([steps[index] for index in kept], [values[index] for index in kept])
        self._series = series

    def state_dict(self) -> dict[str, Any]:
        """Returns the steps, int64[n], and values, float64[n], of each name."""
        return {
            name: {"steps": np.array(steps, np.int64), "values": np.array(values, np.float64)}
            for name, (steps, values) in self._series.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Becomes what `state_dict` was called on."""
        self._series = {
            name: _series(series["steps"].tolist(), series["values"].tolist())
            for name, series in state.items()
        }

    def to_rows(self) -> list[dict[str, Any]]:
        """Returns one dict a step, in order: `{"step": 10, "train/loss": 0.5, ...}` with what was logged there."""
        rows: dict[int, dict[str, Any]] = {}
        for name in self:
            for step, value in self[name]:
                rows.setdefault(step, {"step": step})[name] = value
        return [rows[step] for step in sorted(rows)]

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Returns columns of equal length `n`: `"step"` as int64[n], each name as float64[n], NaN where absent."""
        rows = self.to_rows()
        columns = {name: np.array([row.get(name, np.nan) for row in rows], np.float64) for name in self}
        return {"step": np.array([row["step"] for row in rows], np.int64), **columns}

    def __repr__(self) -> str:
        return f"History({', '.join(f'{name}: {len(steps)}' for name, (steps, _) in self._series.items())})"

    def _named(self, name: str) -> "_Series":
        if name not in self._series:
            raise KeyError(
                f"nothing was logged as {name!r}; the names are {', '.join(sorted(self._series)) or 'none'}"
            )
        return self._series[name]


class _Shown(History):
    def __init__(self, of: History) -> None:
        self._of = of

    @property
    def _series(self) -> dict[str, "_Series"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._of._series

    def append(self, step: int, scalars: Mapping[str, float]) -> None:
        self._refuse()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._refuse()

    def _refuse(self) -> None:
        raise AttributeError(
            "info.history is read-only. To log a scalar write it, info.writer.write_scalars(info.step, {name: value})."
        )


def _series(steps: list[int], values: list[float]) -> "_Series":
    return array("q", steps), array("d", values)
