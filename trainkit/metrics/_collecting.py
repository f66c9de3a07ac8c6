"""Metrics over all rows of an evaluation, computed on the host.

Owns which outputs are kept and how masks apply.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics

from trainkit.metrics._variant import variant

Rows = dict[str, np.ndarray]
Computed = float | np.ndarray | Mapping[str, float | np.ndarray]


@flax.struct.dataclass
class Collecting(metrics.CollectingMetric):
    """A metric that keeps the outputs of every real row and computes once, on the host, at the end.

    For what can't be merged from partial results: areas under curves, rank correlations, quantiles. It costs
    host memory in the number of rows. `collecting(names, fn)` makes one from a function; a subclass instead
    gives `names` and `from_rows`.

    Args:
        values: by output name, a tuple of one array `[batch, ...]` for every batch.
    """

    names: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def wanted(cls, available: Iterable[str]) -> tuple[str, ...]:
        """Returns the names of the outputs to keep, given those there are."""
        del available
        return cls.names

    @classmethod
    def from_rows(cls, rows: Rows) -> Computed:
        """Computes the metric from all real rows.

        Args:
            rows: by output name, an array `[rows, ...]`.

        Returns:
            The value or values.
        """
        raise NotImplementedError(f"{cls.__name__} must implement from_rows(rows).")

    @classmethod
    def from_model_output(cls, *, mask: jax.Array | None = None, **outputs: jax.Array) -> Self:
        """Returns the metric of one batch.

        Args:
            mask: bool `[batch]`; None means that every row is real.
            **outputs: the outputs that the metric keeps, `[batch, ...]`, and others.

        Returns:
            The outputs kept, with the mask beside them.
        """
        kept = {name: jnp.asarray(outputs[name]) for name in cls.wanted(outputs)}
        for name, value in kept.items():
            if value.ndim == 0 or (mask is not None and value.shape[0] != mask.shape[0]):
                expected = "one row per example" if mask is None else f"{mask.shape[0]} rows, as the mask has"
                raise ValueError(
                    f"{cls.__name__} collects the output {name!r} with {expected}, got the shape "
                    f"{value.shape}."
                )
        if mask is None:
            mask = jnp.ones(next(iter(kept.values())).shape[:1], bool)
        values = {name: (value,) for name, value in {**kept, "mask": mask}.items()}
        return cls(values=values)  # pyright: ignore[reportCallIssue]

    def merge(self, other: Self) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the rows of both, on the host."""
        # CLU 0.0.12 takes an empty metric on the left only.
        merged = super().merge(other) if other.values else self
        return merged  # pyright: ignore[reportReturnType]

    def compute(self) -> Computed:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns what `from_rows` makes of the real rows, and NaN where there are none."""
        rows = {
            name: np.concatenate([np.asarray(part) for part in parts]) for name, parts in self.values.items()
        }
        mask = rows.pop("mask", None)
        if mask is not None:
            rows = {name: value[mask.astype(bool)] for name, value in rows.items()}
        if not rows or not len(next(iter(rows.values()))):
            return float("nan")
        return self.from_rows(rows)


def collecting(names: Sequence[str], fn: Callable[[Rows], Computed]) -> type[Collecting]:
    """Returns a metric that calls a function on all real rows of an evaluation.

    Args:
        names: outputs to keep, each `[batch, ...]`.
        fn: gets a dict from output name to NumPy array `[rows, ...]`, and returns a number or an array.

    Returns:
        A metric class for a collection's annotation.

    Raises:
        ValueError: if no name is given.
        TypeError: if `names` is a single string.

    Example:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from trainkit.metrics import collecting
        >>> median = collecting(["loss"], lambda rows: np.median(rows["loss"]))
        >>> float(median.from_model_output(loss=jnp.array([1.0, 2.0, 9.0])).compute())
        2.0
    """
    if isinstance(names, str):
        raise TypeError(
            f"collecting takes a sequence of output names, got the string {names!r}. Use [{names!r}]."
        )
    if not names:
        raise ValueError("collecting needs the name of at least one output, got none.")
    return variant(Collecting, "Collected", names=tuple(names), from_rows=staticmethod(fn))
