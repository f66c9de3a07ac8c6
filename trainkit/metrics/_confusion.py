"""The confusion matrix and the macro-averaged scores that follow from it.

Owns the counting of class pairs.
"""

from typing import ClassVar, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics

from trainkit.metrics._inputs import FromLogits, broadcast_mask
from trainkit.metrics._variant import variant


@flax.struct.dataclass
class ConfusionMatrix(FromLogits, metrics.Metric):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Counts of (label, prediction) pairs, the prediction being the argmax of the logits.

    `ConfusionMatrix.of(num_classes)` is the class to annotate. Rows are labels, columns predictions. Labels
    outside of `[0, num_classes)` are left out: -1 thus means "unlabelled".

    Args:
        matrix: int `[classes, classes]`.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainkit.metrics import ConfusionMatrix
        >>> logits = jnp.array([[2.0, 1.0], [2.0, 1.0], [0.0, 1.0]])
        >>> pairs = ConfusionMatrix.of(2).from_model_output(logits=logits, labels=jnp.array([0, 1, 1]))
        >>> pairs.compute().tolist()
        [[1, 0], [1, 1]]
    """

    num_classes: ClassVar[int] = 0

    matrix: jax.Array

    @classmethod
    def of(cls, num_classes: int) -> type[Self]:
        """Returns the metric for a number of classes.

        Args:
            num_classes: size of the logits' last axis, at least 2.

        Returns:
            A metric class for a collection's annotation.

        Raises:
            ValueError: if there are fewer than 2 classes.
        """
        if num_classes < 2:
            raise ValueError(f"{cls.__name__}.of takes at least 2 classes, got {num_classes}.")
        return variant(cls, cls.__name__, num_classes=num_classes)

    @classmethod
    def empty(cls) -> Self:
        """Returns the metric of no pairs at all.

        Raises:
            TypeError: if the number of classes was never given.
        """
        classes = cls._told_classes()
        return cls(matrix=jnp.zeros((classes, classes), jnp.int32))

    @classmethod
    def _told_classes(cls) -> int:
        if not cls.num_classes:
            raise TypeError(
                f"{cls.__name__} must know its number of classes: use {cls.__name__}.of(num_classes)."
            )
        return cls.num_classes

    @classmethod
    def _check_classes(cls, logits: jax.Array) -> None:
        if logits.shape[-1] != cls._told_classes():
            raise ValueError(
                f"{cls.__name__}.of({cls.num_classes}) got logits of {logits.shape[-1]} classes, shape "
                f"{list(logits.shape)}. Use {cls.__name__}.of({logits.shape[-1]})."
            )

    @classmethod
    def _of_batch(cls, logits: jax.Array, labels: jax.Array, mask: jax.Array | None) -> Self:
        classes = logits.shape[-1]
        labels, mask = broadcast_mask(labels.astype(jnp.int32), mask)
        predictions = logits.argmax(axis=-1).astype(jnp.int32).reshape(labels.shape)
        counted = mask & (labels >= 0) & (labels < classes)
        # A pair that must not count is sent past the end, where the scatter drops it.
        rows = jnp.where(counted, labels, classes)
        nothing = jnp.zeros((classes, classes), jnp.int32)
        return cls(matrix=nothing.at[rows, predictions].add(1, mode="drop"))

    def merge(self, other: Self) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the counts of both sets of pairs; NumPy leaves stay NumPy."""
        return type(self)(matrix=self.matrix + other.matrix)

    def compute(self) -> jax.Array | np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the counts, int `[classes, classes]`, rows by label."""
        return self.matrix


@flax.struct.dataclass
class Pairs(ConfusionMatrix):
    """The counts of a `ConfusionMatrix` of outputs by any names, as many classes as the logits have.

    Empty, it is one number, which takes the shape of what it is merged with.
    """

    logits: ClassVar[str] = "logits"
    labels: ClassVar[str] = "labels"

    @classmethod
    def of_outputs(cls, logits: str, labels: str) -> type[Self]:
        """Returns the metric of outputs with these names."""
        return variant(cls, cls.__name__, logits=logits, labels=labels)

    @classmethod
    def empty(cls) -> Self:
        return cls(matrix=jnp.zeros((1, 1), jnp.int32))

    @classmethod
    def from_model_output(cls, *, mask: jax.Array | None = None, **outputs: jax.Array) -> Self:
        logits, labels = outputs[cls.logits], outputs[cls.labels]
        return super().from_model_output(logits=logits, labels=labels, mask=mask)

    @classmethod
    def _check_classes(cls, logits: jax.Array) -> None:
        if logits.shape[-1] < 2:
            raise ValueError(
                f"A confusion matrix takes logits of at least 2 classes, got the shape {list(logits.shape)}."
            )


def _ratio(hits: jax.Array, total: jax.Array) -> jax.Array:
    # 0 / 0 is 0, as in scikit-learn's zero_division=0.
    return hits / (total + (total == 0).astype(total.dtype))


def _macro(scores: jax.Array, matrix: jax.Array) -> jax.Array:
    seen = (matrix.sum(axis=0) + matrix.sum(axis=1) > 0).astype(scores.dtype)
    return (scores * seen).sum() / seen.sum()


@flax.struct.dataclass
class Precision(ConfusionMatrix):
    """The macro-averaged precision: the mean over classes of hits / predictions.

    The mean is over the classes that occur among the labels or the predictions; a class never predicted
    scores 0. That is `sklearn.metrics.precision_score(average="macro", zero_division=0)`. Without any label
    the result is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainkit.metrics import Precision
        >>> logits = jnp.array([[2.0, 1.0], [2.0, 1.0], [0.0, 1.0]])
        >>> float(Precision.of(2).from_model_output(logits=logits, labels=jnp.array([0, 1, 1])).compute())
        0.75
    """

    def compute(self) -> jax.Array | np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the precision, float `[]`."""
        return _macro(_ratio(self.matrix.diagonal(), self.matrix.sum(axis=0)), self.matrix)


@flax.struct.dataclass
class Recall(ConfusionMatrix):
    """The macro-averaged recall: the mean over classes of hits / labels.

    Classes are averaged as in `Precision`. That is `sklearn.metrics.recall_score(average="macro",
    zero_division=0)`.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainkit.metrics import Recall
        >>> logits = jnp.array([[2.0, 1.0], [2.0, 1.0], [0.0, 1.0]])
        >>> float(Recall.of(2).from_model_output(logits=logits, labels=jnp.array([0, 1, 1])).compute())
        0.75
    """

    def compute(self) -> jax.Array | np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the recall, float `[]`."""
        return _macro(_ratio(self.matrix.diagonal(), self.matrix.sum(axis=1)), self.matrix)


@flax.struct.dataclass
class F1(ConfusionMatrix):
    """The macro-averaged F1 score: the mean over classes of the harmonic mean of precision and recall.

    Classes are averaged as in `Precision`. That is `sklearn.metrics.f1_score(average="macro",
    zero_division=0)`.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainkit.metrics import F1
        >>> logits = jnp.array([[2.0, 1.0], [0.0, 1.0]])
        >>> float(F1.of(2).from_model_output(logits=logits, labels=jnp.array([0, 1])).compute())
        1.0
    """

    def compute(self) -> jax.Array | np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the F1 score, float `[]`."""
        pairs = self.matrix.sum(axis=0) + self.matrix.sum(axis=1)
        hits = self.matrix.diagonal()
        return _macro(_ratio(hits + hits, pairs), self.matrix)
