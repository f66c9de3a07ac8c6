"""`Lambda`: plain functions as a callback."""

from collections.abc import Callable

from trainkit._core.cadence import Cadence, Every, as_cadence
from trainkit.callbacks._callback import Action, Callback
from trainkit.callbacks._info import Info

_EVERY = Every(steps=1)
_Hook = Callable[[Info], Action] | None


class Lambda(Callback):
    """Calls the given functions at the moments they are named after; see `Callback` for these.

    Args:
        every: cadence of `on_step`.
        on_fit_start: `f(info)`, returns None, `Stop` or `Update`; as all but the last two.
        on_epoch_start: the same.
        on_step: the same.
        on_eval_start: the same.
        on_eval_end: the same.
        on_epoch_end: the same.
        on_save: the same.
        on_fit_end: the same.
        on_exception: `f(info, exc)`.
        close: `f()`.

    Raises:
        TypeError: a hook is not a function, or `every` is not a cadence.

    Example:
        >>> seen = []
        >>> callback = Lambda(every=Every(steps=10), on_step=lambda info: seen.append(info.step))
    """

    def __init__(
        self,
        *,
        every: Cadence = _EVERY,
        on_fit_start: _Hook = None,
        on_epoch_start: _Hook = None,
        on_step: _Hook = None,
        on_eval_start: _Hook = None,
        on_eval_end: _Hook = None,
        on_epoch_end: _Hook = None,
        on_save: _Hook = None,
        on_fit_end: _Hook = None,
        on_exception: Callable[[Info, BaseException], None] | None = None,
        close: Callable[[], None] | None = None,
    ) -> None:
        given = {name: hook for name, hook in locals().items() if name not in ("self", "every", "__class__")}
        self.every = as_cadence(every, "every")
        self._hooks = {name: hook for name, hook in given.items() if hook is not None}
        for name, hook in self._hooks.items():
            if not callable(hook):
                raise TypeError(f"Lambda({name}={hook!r}): expected a function.")
            setattr(self, name, hook)

    def implements(self, hook: str) -> bool:
        return hook in self._hooks
