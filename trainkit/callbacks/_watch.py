"""`Watch`: writes norms and histograms of parameters, gradients and updates. Owns what is written, and how."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainkit._core.cadence import Cadence, Every, as_cadence
from trainkit._core.tree import begin_fetch
from trainkit.callbacks._deferred import Deferred
from trainkit.callbacks._info import Info
from trainkit.hooks._probe import StepProbe
from trainkit.hooks._watch import Histograms, watch_probe
from trainkit.writers._writer import MetricWriter

_LOGGER = logging.getLogger("trainkit")
_EVERY = Every(steps=50)
_WHAT = ("params", "grads", "updates")
# SummaryMetadata(plugin_data=PluginData(plugin_name="histograms")), as bytes: its class comes with TensorBoard alone.
_PLUGIN = b"\x0a\x0c\x0a\x0ahistograms"


class Watch(Deferred[dict[str, Any]]):
    """Writes the norms of parameters, gradients and updates, and their histograms, one interval late.

    They are computed inside the step where `every` is due, by a second program of it, and cost other steps nothing.
    With a cadence in seconds, or in passes of unknown length, that is the step after the one at which it is due.

    - `watch/<what>/norm`: the 2-norm of all of it; `watch/<what>/norm/<layer path>`: of one layer, that is of all
      parameters of one module (kernel and bias together), e.g. `watch/grads/norm/Dense_0`.
    - `watch/update_ratio`: the norm of the update over that of the parameters before it.
    - histograms `watch/<what>/<path>` of each parameter, e.g. `watch/params/Dense_0/kernel`, in 32 buckets counted
      on the device, of the finite elements; of complex numbers their magnitudes.

    Parameters are those before the update, gradients those that the optimizer got: of all batches of the step, before
    clipping. An update that was refused or skipped is 0. Where `train_step` is overridden there are no gradients.

    Args:
        every: cadence.
        what: one or more of "params", "grads" and "updates".
        norms: write norms, and the ratio where `what` has "updates".
        histograms: write histograms.
        by_layer: write the norms of each layer too.
        name: of the probe, where a trainer has several of these.

    Raises:
        TypeError: `every` is not a cadence.
        ValueError: `what` is empty or has something else, or there is nothing to write. At the start of a fit: it is
            "grads" alone, and `train_step` is overridden.

    Example:
        >>> callbacks = [Watch(every=Every(steps=100), what=("grads", "updates"), histograms=True)]
    """

    def __init__(
        self,
        every: Cadence = _EVERY,
        what: str | Sequence[str] = _WHAT,
        *,
        norms: bool = True,
        histograms: bool = False,
        by_layer: bool = True,
        name: str = "watch",
    ) -> None:
        super().__init__()
        self.every = as_cadence(every, "every", comes=True)
        self._what = (what,) if isinstance(what, str) else tuple(what)
        wrong = [one for one in self._what if one not in _WHAT]
        if wrong or not self._what:
            raise ValueError(
                f"Watch(what={what!r}): the choices are {', '.join(map(repr, _WHAT))}, one or more of them."
            )
        if not norms and not histograms:
            raise ValueError("Watch(norms=False, histograms=False) writes nothing; leave one of them on.")
        self._norms, self._histograms, self._by_layer, self._name = norms, histograms, by_layer, name
        self._said = False

    def step_probe(self) -> StepProbe:
        return watch_probe(
            self._name,
            # In one order, whatever was given, and each once.
            [one for one in _WHAT if one in self._what],
            norms=self._norms,
            histograms=self._histograms,
            by_layer=self._by_layer,
        )

    def _take(self, info: Info) -> dict[str, Any]:
        begin_fetch(info.probed)
        return info.probed

    def _write(self, writer: MetricWriter, step: int, taken: dict[str, Any]) -> None:
        self._say_what_is_missing(taken)
        if "norms" in taken:
            writer.write_scalars(step, taken["norms"].read())
        if "histograms" in taken:
            tables = _tables(taken["histograms"])
            writer.write_summaries(step, tables, dict.fromkeys(tables, _PLUGIN))

    def _say_what_is_missing(self, taken: dict[str, Any]) -> None:
        names = next(iter(taken.values())).names
        if (
            not self._said
            and "grads" in self._what
            and not any(one.startswith("watch/grads") for one in names)
        ):
            _LOGGER.warning(
                "Watch writes no gradients: this trainer has its own train_step, which tells none."
            )
            self._said = True


def _tables(histograms: Histograms) -> dict[str, np.ndarray]:
    """Returns `float32[BUCKETS, 3]` by name, as TensorBoard holds histograms: left and right edge, and count."""
    low, high = (np.asarray(edge, np.float64) for edge in (histograms.low, histograms.high))
    counts, tables = np.asarray(histograms.counts), {}
    for index, name in enumerate(histograms.names):
        if not counts[index].any():
            continue
        if low[index] == high[index]:
            # As TensorBoard does of a single value: a bucket without width is not seen.
            table = np.array([[low[index] - 0.5, high[index] + 0.5, counts[index].sum()]])
        else:
            edges = np.linspace(low[index], high[index], counts.shape[1] + 1)
            table = np.stack([edges[:-1], edges[1:], counts[index]], axis=1)
        tables[name] = table.astype(np.float32)
    return tables
