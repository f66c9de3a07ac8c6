"""`EvalView`: a function of the state that says with which weights it is evaluated."""

from collections.abc import Callable

from trainkit._core.state import TrainState
from trainkit.callbacks._callback import Callback
from trainkit.hooks._view import View


class EvalView(Callback):
    """Has `evaluate`, `predict`, `apply` and `tk.export` look at `fn(state)`, as they do at the averages of an `EMA`.

    For optimizers whose parameters in training are not those to be evaluated, such as `optax.contrib.schedule_free`.

    Args:
        fn: `fn(state) -> TrainState`, pure, of the same structure, shapes and dtypes; traced and compiled once.
        name: of the view, for `weights=`.

    Raises:
        TypeError: `fn` is no function; when the view is first read, when it returned no train state.
        ValueError: when the view is first read, when it is of another structure.

    Example:
        >>> import optax
        >>> def evaluated(state):
        ...     params = optax.contrib.schedule_free_eval_params(state.opt_state, state.params)
        ...     return state.replace(params=params)
        >>> view = EvalView(evaluated)
    """

    def __init__(self, fn: Callable[[TrainState], TrainState], *, name: str = "eval_view") -> None:
        if not callable(fn):
            raise TypeError(
                f"EvalView(fn={fn!r}): expected a function of the state, e.g. lambda state: state.replace(params=...)."
            )
        self._fn, self._name = fn, name

    def eval_view(self) -> View:
        return View(self._name, self._fn)
