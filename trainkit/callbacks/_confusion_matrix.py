"""`ConfusionMatrix`: which classes the model takes for which, as an image in the log. Counts nothing itself."""

from collections.abc import Sequence
from typing import Any

import clu.metrics
import numpy as np

from trainkit._core.cadence import Cadence, Never, as_cadence
from trainkit.callbacks._callback import Callback
from trainkit.callbacks._figure import as_pixels, check_matplotlib
from trainkit.callbacks._info import Info
from trainkit.callbacks._shown import check_name
from trainkit.metrics._confusion import Pairs

_MOST_WITH_NUMBERS, _MOST_WITH_NAMES = 16, 40


class ConfusionMatrix(Callback):
    """Evaluates on `data` and writes how often each class was taken for which, as an image.

    Rows are the true classes, columns the predicted ones, the highest logit of each row of data; each row of the
    matrix is shown as shares of its class, with numbers in it up to 16 classes. It counts as
    `tk.metrics.ConfusionMatrix` does, on the devices: each row of data once, padding never, labels outside of the
    classes not at all. The outputs are those that `loss`, or your `eval_step`, gives to the metrics.

    Args:
        data: a source, or a mapping of names to sources, which are written as `name/<name of the source>`.
        every: cadence; by default after each evaluation of the fit, or each epoch where it has none.
        name: in the log.
        classes: their names, in order; numbers by default.
        logits: name of the output with the logits, float `[batch, ..., classes]`.
        labels: name of the output with the labels, integer `[batch, ...]`.
        weights: which weights are evaluated, as for `Trainer.evaluate`.

    Attributes:
        counts: of the newest evaluation by name in the log, int64 `[classes, classes]`, rows by label.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: `every` is no cadence, or a name no string.
        ValueError: during the fit, where an output is missing or does not fit; `classes` are not as many.

    Example:
        >>> data = [{"image": np.zeros((8, 4, 4, 1)), "label": np.zeros(8, np.int32)}]
        >>> callback = ConfusionMatrix(data, classes=["cat", "dog"])
    """

    reads_epoch = False

    def __init__(
        self,
        data: Any,
        *,
        every: Cadence | None = None,
        name: str = "confusion_matrix",
        classes: Sequence[str] | None = None,
        logits: str = "logits",
        labels: str = "labels",
        weights: str = "averaged",
    ) -> None:
        check_matplotlib("ConfusionMatrix")
        for given in (name, logits, labels):
            check_name("ConfusionMatrix", given)
        self.every = Never() if every is None else as_cadence(every, "every")
        self.counts: dict[str, np.ndarray] = {}
        self._by_default, self._data, self._name, self._weights = every is None, data, name, weights
        self._classes = None if classes is None else tuple(map(str, classes))
        self._metrics = clu.metrics.Collection.create(pairs=Pairs.of_outputs(logits, labels))

    def on_step(self, info: Info) -> None:
        if not self._by_default:
            self._write(info)

    def on_eval_end(self, info: Info) -> None:
        if self._by_default:
            self._write(info)

    def on_epoch_end(self, info: Info) -> None:
        if self._by_default and not info.plan.eval_names:
            self._write(info)

    def reset(self) -> None:
        self.counts = {}

    def _write(self, info: Info) -> None:
        found = info.evaluate(self._data, weights=self._weights, metrics=self._metrics)
        self.counts = {"/".join([self._name, *name.split("/")[:-1]]): found[name] for name in found}
        info.writer.write_images(
            info.step, {name: self._image(counts) for name, counts in self.counts.items()}
        )

    def _image(self, counts: np.ndarray) -> np.ndarray:
        names = tuple(map(str, range(len(counts)))) if self._classes is None else self._classes
        if len(names) != len(counts):
            raise ValueError(
                f"ConfusionMatrix(classes=...) has {len(names)} names and the logits {len(counts)} classes; give one "
                "name for each."
            )
        return as_pixels(draw(counts, names))


def draw(counts: np.ndarray, names: Sequence[str]) -> Any:
    """Returns a figure of a confusion matrix, which pyplot does not know.

    Args:
        counts: `[classes, classes]`, rows by label.
        names: of the classes.
    """
    from matplotlib.figure import Figure

    total = counts.sum()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(0.45 * len(names) + 1.8, 3.6, 12))
    figure = Figure(figsize=(side, side), dpi=100, layout="constrained")
    axes: Any = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true")
    if total:
        axes.set_title(f"{np.trace(counts) / total:.2%} of {total} right")
    if len(names) <= _MOST_WITH_NAMES:
        long = max(map(len, names)) > 3
        axes.set_xticks(range(len(names)), names, rotation=90 if long else 0)
        axes.set_yticks(range(len(names)), names)
    if len(names) <= _MOST_WITH_NUMBERS:
        for (row, column), share in np.ndenumerate(shares):
            if counts[row, column]:
                color = "white" if share > 0.5 else "black"
                axes.text(column, row, f"{share:.2f}", ha="center", va="center", color=color, fontsize=8)
    return figure
