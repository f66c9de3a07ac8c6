"""`EMA`: an exponential moving average of the weights, traced into the step."""

from trainkit._core.state import TrainState
from trainkit.callbacks._callback import Callback
from trainkit.hooks._ema import EmaState, ema_hook, view
from trainkit.hooks._hook import StepHook
from trainkit.hooks._view import View


class EMA(Callback):
    """Keeps `ema = decay * ema + (1 - decay) * params` in `state.hooks[name]`, once per optimizer update.

    It gives a view of the state: `evaluate`, `predict` and `apply` read the averages unless told `weights="live"`,
    of several those of the callback given first or of the name asked for. The live weights are never swapped. Leaves
    that are not floats are copied.

    Args:
        decay: float in (0, 1), or None when `half_life` is given.
        half_life: float > 0, updates after which a value counts half; `decay = 0.5 ** (1 / half_life)`.
        debias: start at zero and divide by `1 - decay**t` when read (Kingma and Ba 2015, section 3), instead
            of starting at the initial weights.
        batch_stats: average `batch_stats` too.
        name: key in `state.hooks`, and of the view.

    Raises:
        ValueError: not exactly one of `decay` and `half_life`, or one out of range.

    Example:
        >>> EMA(half_life=100).decay
        0.9930924954370359
    """

    def __init__(
        self,
        decay: float | None = None,
        *,
        half_life: float | None = None,
        debias: bool = False,
        batch_stats: bool = True,
        name: str = "ema",
    ) -> None:
        if (decay is None) == (half_life is None):
            raise ValueError(
                f"EMA(decay={decay}, half_life={half_life}): give exactly one, e.g. EMA(0.999) or EMA(half_life=700)."
            )
        if half_life is not None:
            if not half_life > 0:
                raise ValueError(f"EMA(half_life={half_life}): must be a positive number of updates.")
            decay = 0.5 ** (1 / half_life)
        assert decay is not None
        if not 0 < decay < 1:
            raise ValueError(f"EMA(decay={decay}): must lie between 0 and 1, both excluded; 0.999 is common.")
        self.decay = decay
        self._debias, self._batch_stats, self._name = debias, batch_stats, name

    def step_hook(self) -> StepHook:
        return ema_hook(self._name, self.decay, debias=self._debias, batch_stats=self._batch_stats)

    def eval_view(self) -> View:
        name = self._name

        def fn(state: TrainState) -> TrainState:
            memory = state.hooks.get(name)  # a state made elsewhere has none until it is trained
            return view(state, memory) if isinstance(memory, EmaState) else state

        return View(name, fn)

    @staticmethod
    def view(state: TrainState, name: str | None = None) -> TrainState:
        """Returns `state` with the averages in place of `params` and `batch_stats`.

        Args:
            state: a state trained with an `EMA`.
            name: which average, when there are several; the first by default.

        Raises:
            ValueError: the state holds no such average.
        """
        averages = {key: memory for key, memory in state.hooks.items() if isinstance(memory, EmaState)}
        memory = averages.get(name) if name else next(iter(averages.values()), None)
        if memory is None:
            raise ValueError(
                f"state.hooks has {sorted(state.hooks) or 'nothing'} and no average"
                f"{f' named {name!r}' if name else ''}; train with callbacks=[tk.callbacks.EMA(...)]."
            )
        return view(state, memory)
