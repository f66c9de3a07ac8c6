"""`SWA`: the plain mean of the weights along the end of a run, traced into the step."""

from typing import Any

from trainkit._core.state import TrainState
from trainkit._core.typing import PyTree
from trainkit.callbacks._callback import Callback
from trainkit.callbacks._info import Info
from trainkit.callbacks._monitor import check_count
from trainkit.data._source import as_source
from trainkit.hooks._hook import StepHook
from trainkit.hooks._swa import SwaState, swa_hook, view, wants_statistics, with_statistics
from trainkit.hooks._view import Refresh, View


class SWA(Callback):
    """Keeps the mean of the parameters after updates `start`, `start + every`, ... in `state.hooks[name]`.

    Stochastic weight averaging (Izmailov et al. 2018). It gives a view of the state as `EMA` does: evaluations read
    the mean once there is one, before that the live weights, which are never swapped.

    Batch statistics are those of the live weights, unless `refresh` says from which data they are to be estimated for
    the mean: one pass in training mode without dropout, after which each `nn.BatchNorm` has the mean and the
    variance over all examples, those of its batches pooled by their numbers of examples. That is done before an
    evaluation that reads the mean, where the mean has changed, and when the fit ends; it takes as long as a pass of
    evaluation over `refresh`. Other layers with batch statistics keep the live ones.

    Args:
        start: int >= 1, the update after which the parameters are taken first.
        every: int >= 1, updates from one to the next.
        refresh: a source of batches, passed over in its order; None to estimate nothing.
        name: key in `state.hooks`, and of the view.

    Raises:
        ValueError: `start` or `every` is out of range; at the start of a fit, when `refresh` is given and the model has
            no batch statistics.
        TypeError: `refresh` is no source.

    Example:
        >>> swa = SWA(start=1000, every=100)
    """

    def __init__(self, start: int, every: int = 1, *, refresh: Any = None, name: str = "swa") -> None:
        check_count("SWA", "start", start, least=1, why="it is the number of an update, counted from 1")
        check_count("SWA", "every", every, least=1, why="it is a number of updates")
        if refresh is not None:
            as_source(refresh, units=True)
        self._start, self._stride, self._refresh, self._name = start, every, refresh, name

    def step_hook(self) -> StepHook:
        return swa_hook(self._name, self._start, self._stride, batch_stats=self._refresh is not None)

    def eval_view(self) -> View:
        name = self._name

        def fn(state: TrainState) -> TrainState:
            memory = _memory(state, name)  # a state made elsewhere has none until it is trained
            return state if memory is None else view(state, memory)

        def wanted(state: TrainState) -> bool:
            memory = _memory(state, name)
            return memory is not None and wants_statistics(memory)

        def keep(state: TrainState, batch_stats: PyTree) -> TrainState:
            return state.replace(hooks={**state.hooks, name: with_statistics(state.hooks[name], batch_stats)})

        refresh = None if self._refresh is None else Refresh(self._refresh, wanted, keep)
        return View(name, fn, refresh)

    def on_fit_start(self, info: Info) -> None:
        if self._refresh is not None and not info.state.batch_stats:
            raise ValueError(
                "SWA(refresh=...) estimates batch statistics anew, and the model keeps none: leave refresh out."
            )

    @staticmethod
    def view(state: TrainState, name: str = "swa") -> TrainState:
        """Returns `state` with the mean in place of `params`, and of `batch_stats` where they were estimated for it.

        Args:
            state: a state trained with an `SWA`; before its `start` it comes back as it is.
            name: which one, when there are several.

        Raises:
            ValueError: the state holds no such mean.
        """
        memory = _memory(state, name)
        if memory is None:
            raise ValueError(
                f"state.hooks has {sorted(state.hooks) or 'nothing'} and no mean named {name!r}; train with "
                "callbacks=[tk.callbacks.SWA(...)]."
            )
        return view(state, memory)


def _memory(state: TrainState, name: str) -> SwaState | None:
    memory = state.hooks.get(name)
    return memory if isinstance(memory, SwaState) else None
