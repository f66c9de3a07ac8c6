"""Which checkpoints are kept. A pure rule; owns no files."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Best:
    """By what the best checkpoint is chosen.

    Attributes:
        name: full name of a metric, e.g. `eval/loss`.
        mode: which way it improves.
    """

    name: str
    mode: Literal["min", "max"]


def best_steps(scores: Mapping[int, Mapping[str, float]], best: Best, count: int) -> list[int]:
    """Returns the steps with the best scores, best first; of equal ones the older, never one that is NaN.

    Args:
        scores: metrics by full name, by step.
        best: by what they are compared.
        count: how many at most.
    """
    sign = 1 if best.mode == "min" else -1
    ranked = [
        (sign * known[best.name], step)
        for step, known in scores.items()
        if best.name in known and not math.isnan(known[best.name])
    ]
    return [step for _, step in sorted(ranked)[:count]]


def best_step(scores: Mapping[int, Mapping[str, float]], best: Best) -> int | None:
    """Returns the step with the best score, None where there is none; see `best_steps`."""
    return next(iter(best_steps(scores, best, 1)), None)


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest and the best.

    Attributes:
        keep: int >= 1, how many of the newest; None for all.
        best: by what more are kept.
        top: int >= 1, how many of the best.
    """

    keep: int | None = None
    best: Best | None = None
    top: int = 1

    def kept(self, scores: Mapping[int, Mapping[str, float]]) -> set[int]:
        """Returns the steps of those that stay.

        Args:
            scores: of every complete checkpoint, by step.
        """
        steps = sorted(scores)
        kept = set(steps if self.keep is None else steps[-self.keep :])
        return kept if self.best is None else kept.union(best_steps(scores, self.best, self.top))
