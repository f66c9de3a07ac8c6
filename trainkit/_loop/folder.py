"""The folder of a run as a fit finds it: its own, that of another run, or an empty one.

Owns the refusal to mix two runs, and starting over; not what is written there.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterator

import jax

from trainkit._debug.failures import remove_failures
from trainkit._loop.request import Request
from trainkit._loop.run import Run
from trainkit.callbacks._checkpoint import Checkpoint
from trainkit.callbacks._profile import remove_traces
from trainkit.checkpoint._reading import FOLDER
from trainkit.checkpoint._store import Store
from trainkit.writers._left import logs_in, remove_logs
from trainkit.writers._logdir import locked


@contextlib.contextmanager
def holding_folder(run: Run, request: Request) -> Iterator[None]:
    """Keeps other runs out of the folder of a fit; nothing is written yet.

    Args:
        run: of the trainer.
        request: what the fit was asked.

    Raises:
        OSError: the folder can't be made or written to.
        ValueError: another run writes to it, or it holds one.
    """
    with locked(None if jax.process_index() else request.logdir):
        if not (request.dry or run.has_folder or request.overwrite):
            stores = _stores(request)
            if run.restored_from is not None and _is_among(run.restored_from, stores):
                _refuse_later(run, stores)
                run.behind = True  # the logs hold more than the step at which it stands
            elif not request.stores and jax.process_index() == 0:
                _refuse_another(request.logdir, stores)
        yield


def settle(run: Run, request: Request) -> None:
    """Has the folder belong to `run` from here on, the run that it held removed where that was asked for.

    Raises:
        OSError: something could not be removed.
    """
    if request.dry or run.has_folder:
        return
    if request.overwrite and jax.process_index() == 0:
        for store in _stores(request):
            store.clear()
        if request.logdir is not None:
            remove_failures(request.logdir)
            remove_traces(request.logdir)
            remove_logs(request.logdir)
    run.has_folder = True


def _stores(request: Request) -> list[Store]:
    folders = [one.folder(request.logdir) for one in request.callbacks if isinstance(one, Checkpoint)]
    shared = [str(folder) for folder in folders if folders.count(folder) > 1]
    if shared:
        raise ValueError(
            f"two Checkpoints save to {shared[0]!r}, and each would remove what the other keeps: give "
            "one another folder=."
        )
    if request.logdir is not None:
        folders.append(request.logdir / FOLDER)
    return [Store(folder) for folder in dict.fromkeys(folders)]


def _is_among(folder: pathlib.Path, stores: list[Store]) -> bool:
    return os.path.realpath(folder) in {os.path.realpath(store.folder) for store in stores}


def _refuse_later(run: Run, stores: list[Store]) -> None:
    for store in stores:
        later = [step for step in store.steps() if step > run.steps_done]
        if later:
            raise ValueError(
                f"{store.folder} has checkpoints of the steps {', '.join(map(str, later))}, and this fit begins at "
                f"step {run.steps_done}, to which the trainer was restored. Give another logdir, or move the later "
                "checkpoints away; fit(..., resume=True) goes on from the newest."
            )


def _refuse_another(logdir: pathlib.Path | None, stores: list[Store]) -> None:
    held = ["logs"] if logdir is not None and logs_in(logdir) else []
    held += [f"checkpoints up to step {steps[-1]}" for store in stores if (steps := store.steps())]
    if held:
        where = stores[0].folder if logdir is None else logdir
        raise ValueError(
            f"{os.fspath(where)!r} holds a run already ({', '.join(held)}), with which this one would be mixed. Give "
            "another logdir; or go on with that run, fit(..., resume=True), which needs tk.callbacks.Checkpoint(); or "
            "start over, Trainer(overwrite=True), which removes what trainkit wrote there and nothing else."
        )
