"""`Monitor`: one metric watched by name, its direction, and the best value so far.

Owns the rule of what counts as better; not what follows from it, which is the callback's.
"""

import math
from typing import Any

import numpy as np

from trainkit.callbacks._info import Info

EVALUATION = "on_eval_end"
EPOCH = "on_epoch_end"


class Monitor:
    """Watches one metric, which improves iff `value < best - min_delta` (mode "min"; mirrored for "max").

    The first finite value is an improvement; a value that is not finite never is one.

    Args:
        owner: name of the class that errors speak of.
        name: full name of a metric, e.g. `eval/loss`.
        mode: "min", "max", or None to follow from the registered metric.
        min_delta: float >= 0, by how much a value must be better.

    Attributes:
        best: the best value so far, None before the first.
        best_step: step of `best`.

    Raises:
        TypeError: `name` is not a str.
        ValueError: `mode` or `min_delta` is not allowed.
    """

    def __init__(self, owner: str, name: str, *, mode: str | None, min_delta: float) -> None:
        if not isinstance(name, str):
            raise TypeError(
                f"{owner}(monitor={name!r}): expected the full name of a metric, e.g. 'eval/loss'."
            )
        if mode not in (None, "min", "max"):
            raise ValueError(
                f"{owner}(mode={mode!r}): must be 'min' or 'max', or None for a registered metric."
            )
        if not (math.isfinite(min_delta) and min_delta >= 0):
            raise ValueError(f"{owner}(min_delta={min_delta!r}): must be a finite number, 0 or more.")
        self.name = name
        self.best: float | None = None
        self.best_step = 0
        self._owner, self._given_mode, self._min_delta = owner, mode, min_delta
        self._sign, self._hook = 1.0, EVALUATION

    @property
    def unit(self) -> str:
        """What is counted: "evaluations" or "epochs"."""
        return "evaluations" if self._hook == EVALUATION else "epochs"

    def start(self, info: Info) -> None:
        """Finds out when the metric is told and which way is better.

        Raises:
            ValueError: nothing of this fit has that prefix, or the direction is not known.
        """
        self._hook = self._find_hook(info.plan.eval_names)
        mode = self._given_mode or info.direction(self.name)
        if mode not in ("min", "max"):
            raise ValueError(
                f"{self._owner}({self.name!r}): no registered metric says whether less or more of "
                f"{self.name!r} is better; pass mode='min' or mode='max'."
            )
        self._sign = 1.0 if mode == "min" else -1.0

    def reset(self) -> None:
        """Forgets the best value."""
        self.best, self.best_step = None, 0

    def value(self, info: Info, hook: str) -> float | None:
        """Returns the metric, or None where `hook` is not the one that tells it.

        Raises:
            ValueError: it is told here and missing, or is not a single number.
        """
        if hook != self._hook:
            return None
        metrics = info.metrics
        if self.name not in metrics:
            names = ", ".join(sorted(metrics)) or "none"
            raise ValueError(
                f"{self._owner} monitors {self.name!r}, which is not there; the names are: {names}."
            )
        value = metrics[self.name]
        if np.ndim(value) != 0:
            raise ValueError(
                f"{self._owner} monitors {self.name!r}, which has the shape {np.shape(value)}; "
                "monitor a single number."
            )
        return float(value)

    def improved(self, value: float, step: int) -> bool:
        """Says whether `value` at `step` is an improvement, and remembers it if it is."""
        if not math.isfinite(value):
            return False
        if self.best is not None and not self._sign * value < self._sign * self.best - self._min_delta:
            return False
        self.best, self.best_step = value, step
        return True

    def since_best(self, count: int) -> str:
        """Returns in words that the last `count` values brought no improvement."""
        if self.best is None:
            return f"{self.name} has not been finite in {count} {self.unit}"
        return (
            f"{self.name} has not improved on {self.best:.6g} (step {self.best_step}) "
            f"for {count} {self.unit if count != 1 else self.unit[:-1]}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns the best value and its step."""
        return {"best": self.best, "best_step": self.best_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned."""
        self.best, self.best_step = state["best"], state["best_step"]

    def _find_hook(self, eval_names: tuple[str, ...]) -> str:
        if any(self.name.startswith(f"{name}/") for name in eval_names):
            return EVALUATION
        if self.name.startswith("train/"):
            return EPOCH
        prefixes = ", ".join(f"{name}/" for name in (*eval_names, "train"))
        cure = "" if eval_names else " Pass eval_data= to fit for metrics of an evaluation."
        raise ValueError(
            f"{self._owner} monitors {self.name!r}, but the metrics of this fit begin with one of: "
            f"{prefixes}.{cure}"
        )


def check_count(owner: str, argument: str, value: object, *, least: int, why: str) -> None:
    """Refuses `value` unless it is an int of at least `least`.

    Raises:
        ValueError: it is not; the message ends in `why`.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{owner}({argument}={value!r}): must be an int, {least} or more; {why}.")
