"""Whether what pads a batch stays out of the numbers: found out by running one padded batch with two paddings.

A loss for each row that compares the rows of its batch, as with in-batch negatives, makes padding count. That can't be
seen in a shape, so it is tried, once a trainer, before the first padded batch counts. Owns the comparison and what is
said; not the steps, nor how a batch is padded.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from trainkit._core.state import TrainState
from trainkit._core.typing import PyTree
from trainkit._engine.prepared import Prepared
from trainkit._feed.feed import Fed, Feed
from trainkit._feed.resident import pick
from trainkit._step.steps import Steps
from trainkit.parallel._strategy import Role, Strategy

_LOG = logging.getLogger("trainkit")
# Rows that are computed alike come out alike to the bit but for solvers and sums without an order.
_TOLERANCE = 1e-4


class PaddingCheck:
    """Compares two paddings of one batch, once for training and once for evaluation.

    Args:
        steps: of the trainer.
        strategy: of the trainer.
    """

    def __init__(self, steps: Steps, strategy: Strategy) -> None:
        self._steps, self._strategy = steps, strategy
        self._seen: dict[str, bool] = {}

    def training(self, feed: Feed, step: int, raw: TrainState, impl: str, held: PyTree, handed: Any) -> None:
        """Refuses a loss whose rows depend on what pads their batch; to be called before the batch is trained on.

        Args:
            feed: pads it.
            step: updates completed.
            raw: the state after them, its key raw.
            impl: of that key.
            held: what training steps are given, and data on the device.
            handed: the batch, or the numbers of its rows in `held`.
        """
        if not self._is_due("training", lambda: step):
            return
        bare, row_losses = raw.replace(opt_state=(), hooks={}), self._row_losses(impl)

        def run(fed: Fed) -> dict[str, Any]:
            losses = row_losses(bare, held, fed.batch, fed.mask)
            found, mask = self._strategy.fetch((losses, fed.mask))
            return {name: value[mask] for name, value in found.items()}

        self._compare("training", step, *feed.twice(handed), run)

    def evaluation(self, prepared: Prepared, raw: TrainState, batch: Any) -> None:
        """As `training`, before a padded batch is evaluated; compares what the metrics come to.

        Args:
            prepared: the evaluation step.
            raw: the state that it takes.
            batch: of the source.
        """
        if not self._is_due("evaluation", lambda: int(raw.step)):
            return
        accumulator = prepared.accumulator

        def run(fed: Fed) -> dict[str, Any]:
            (packed, _), collected = self._strategy.fetch(
                prepared.step(raw, prepared.empty, fed.batch, fed.mask)
            )
            return {**vars(accumulator.unpack(packed)), **accumulator.real_rows(collected)}

        fed, other = prepared.feed.twice(batch)
        self._compare("evaluation", int(raw.step), fed, other, run, accumulator.reads_scalar)

    def _row_losses(self, impl: str) -> Callable[..., dict[str, jax.Array]]:
        def losses(raw: TrainState, held: PyTree, handed: Any, mask: Any) -> dict[str, jax.Array]:
            given, data = held
            return self._steps.row_losses(impl, given, raw, pick(data, handed), mask)

        inputs = (Role.STATE, Role.WHOLE, Role.ROWS, Role.ROWS)
        return self._strategy.compile(losses, inputs=inputs, outputs=Role.ROWS)

    def _is_due(self, kind: str, step: Callable[[], int]) -> bool:
        """Says whether padded batches are still to be looked at.

        Args:
            kind: of step, `"training"` or `"evaluation"`.
            step: returns the updates completed; asked only where it matters.
        """
        # An untrained model may be constant, with nothing yet to be mixed.
        return not self._seen.get(kind, False) and (kind not in self._seen or step() > 0)

    def _compare(
        self,
        kind: str,
        step: int,
        fed: Fed,
        other: Fed,
        run: Callable[[Fed], Mapping[str, PyTree]],
        is_scalar: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """Runs both paddings of a batch.

        Args:
            kind: of step.
            step: updates completed.
            fed: the batch as it is padded.
            other: the same rows with another padding.
            run: returns what of a batch counts, by name, NumPy arrays.
            is_scalar: says whether what has a name is of a scalar output, which users may have for a look only.

        Raises:
            ValueError: something differs that should not.
        """
        self._seen[kind] = step > 0
        one, two = run(fed), run(other)
        names = [name for name in one if not _alike(one[name], two[name])]
        for name in filter(is_scalar, names):
            _LOG.warning(
                "the metric %r is of a scalar output that depends on the rows that only pad a batch: it is not exact. "
                "Return one row per example, or leave the padding out with ctx.mask.",
                name,
            )
        names = [name for name in names if not is_scalar(name)]
        if names:
            raise ValueError(_mixed(kind, fed.real, names))


def _alike(one: PyTree, two: PyTree) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return all(np.allclose(a, b, rtol=_TOLERANCE, atol=1e-9, equal_nan=True) for a, b in pairs)


def _mixed(kind: str, real: int, names: list[str]) -> str:
    what = ", ".join(map(repr, names))
    said = (
        f"the losses of the real rows change ({what})" if kind == "training" else f"the metrics {what} change"
    )
    return (
        f"a batch of {real} examples is padded for {kind}, and {said} with what pads it. So the loss, or what the "
        "metrics are given, mixes the rows of a batch, as in-batch negatives do, and the padding would count. Either "
        "give batches that need no padding (a batch size that divides the number of examples and is a multiple of "
        "the devices, or drop_last=True), or return a scalar loss, with which nothing is padded, or leave the padding "
        "out where rows meet, with ctx.mask."
    )
