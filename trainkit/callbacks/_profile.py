"""`Profile`: traces a few steps of a fit for TensorBoard's profile page. Reads no trace."""

import contextlib
import itertools
import logging
import pathlib
from collections.abc import Iterable

import jax

from trainkit._core.cadence import At
from trainkit._core.files import remove
from trainkit._core.phases import name_phases
from trainkit.callbacks._callback import Callback
from trainkit.callbacks._info import Info

_FOLDER, _NAME = ("plugins", "profile"), "step_"
_FILES = ("*.xplane.pb", "*.trace.json.gz")
_LOG = logging.getLogger("trainkit")


class Profile(Callback):
    """Traces `steps` steps with `jax.profiler` once `at` steps are done, into the `logdir` of the run.

    TensorBoard shows it on its page "Profile", with the package `xprof` installed. In the trace are named: `step`, each
    call of steps with the number done before it, `data`, `eval`, `save` and `callbacks`; with `steps_per_call=1` each
    step is a call. Before and after the traced steps the devices are waited for; where no trace runs nothing is.

    A trace that is under way ends with the fit, also where that raises; resumed inside of it, a run traces the rest.
    Of several processes the first one traces. Without a `logdir`, and while somebody else traces, it says so in the
    log and does nothing.

    Args:
        at: int >= 0, updates completed when the trace begins, or several of them.
        steps: int >= 1, how many are traced each time.

    Raises:
        ValueError: one is out of range, or two of the traces overlap.

    Example:
        >>> callbacks = [Profile(at=100, steps=5)]
    """

    def __init__(self, at: int | Iterable[int] = 10, *, steps: int = 5) -> None:
        starts = sorted({at} if isinstance(at, int) else set(at))
        if not starts or any(not _is_int(start, 0) for start in starts):
            raise ValueError(f"Profile(at={at!r}): must be an int, 0 or more, or several of them.")
        if not _is_int(steps, 1):
            raise ValueError(f"Profile(steps={steps!r}): must be an int, 1 or more.")
        if any(later - start < steps for start, later in itertools.pairwise(starts)):
            raise ValueError(
                f"Profile(at={at!r}, steps={steps}): the traces overlap; begin each at least {steps} steps after "
                "the one before."
            )
        self._ends = {start: start + steps for start in starts}
        self.every = At(steps=tuple(step for step in {*self._ends, *self._ends.values()} if step))
        self._end: int | None = None

    def on_fit_start(self, info: Info) -> None:
        self._end = None
        if info.logdir is None and jax.process_index() == 0:
            _LOG.warning("Profile traces nothing: the trainer has no logdir to write to. Give it one.")
        self._begin(info)

    def on_step(self, info: Info) -> None:
        if self._end is not None and info.step >= self._end:
            jax.block_until_ready(info.state.params)
            self.close()
        if self._end is None:
            self._begin(info)

    def close(self) -> None:
        """Ends the trace that is under way, if one is."""
        if self._end is not None:
            self._end = None
            name_phases(False)
            jax.profiler.stop_trace()

    def _begin(self, info: Info) -> None:
        end = next((end for start, end in self._ends.items() if start <= info.step < end), None)
        if end is None or info.logdir is None or jax.process_index():
            return
        jax.block_until_ready(info.state.params)
        options = jax.profiler.ProfileOptions()
        # Else it is named after the second in which it ends, and another of that second takes its place.
        options.session_id = f"{_NAME}{info.step}"
        try:
            jax.profiler.start_trace(info.logdir, profiler_options=options)
        except RuntimeError as error:  # the process has one profiler
            _LOG.warning("Profile traces nothing at step %d: %s", info.step, error)
            return
        self._end = end
        name_phases(True)


def remove_traces(logdir: pathlib.Path) -> None:
    """Removes the traces that `Profile` left in a folder of logs; leaves what others put there.

    Raises:
        OSError: the system refused it.
    """
    plugins, folder = logdir / _FOLDER[0], logdir.joinpath(*_FOLDER)
    if plugins.is_symlink() or folder.is_symlink() or not folder.is_dir():
        return
    for trace in folder.glob(f"{_NAME}*"):
        if trace.name.removeprefix(_NAME).isdecimal() and trace.is_dir() and not trace.is_symlink():
            for path in [path for pattern in _FILES for path in trace.glob(pattern)]:
                remove(path)
            with contextlib.suppress(OSError):  # somebody keeps something there
                trace.rmdir()
    for empty in (folder, plugins):
        with contextlib.suppress(OSError):
            empty.rmdir()


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
