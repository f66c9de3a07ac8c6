"""`HParams`: what a run was set up with, and how good it got, for TensorBoard's table of runs.

Owns what may stand there and under which names; the table is the writers'.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from trainkit.callbacks._callback import Callback
from trainkit.callbacks._hyperparams import as_shown, numbers_of
from trainkit.callbacks._info import Info

Plain = bool | int | float | str
"""What a cell of the table holds."""

_BEST = "best/"
_ALLOWED = (
    "Allowed are bool, int, float and str, arrays of no dimension, and mappings, lists and tuples of these"
)


class HParams(Callback):
    """Writes the hyperparameters of the run at its start, and the best value of each metric however a fit ends.

    `Trainer(hparams={...})` has one by itself. TensorBoard's HPARAMS page then compares the runs of a folder. Beside
    what is given there stand `seed`, `batch_size`, and the values that `optax.inject_hyperparams` holds when the run
    begins, such as `learning_rate`; of a name that is given twice, what was given to this callback counts, then what
    was given to the trainer. Nested names are joined: `model/width`. The last value of a metric is there under its
    name, as the log has it; the best one is written as `best/<name>` where it is known which way the metric improves.

    Args:
        hparams: further hyperparameters by name: bool, int, float, str, or mappings and lists of these.

    Raises:
        TypeError: `hparams` is no mapping, or a value in it is something else.
        ValueError: two names are the same once they are joined.

    Example:
        >>> callback = HParams({"model": {"width": 64}, "augment": True})
    """

    reads_epoch = False

    def __init__(self, hparams: Mapping[str, Any] | None = None) -> None:
        self._hparams = flat_hparams("HParams(hparams=...)", hparams or {})
        self._written = False
        self._best_at: int | None = None

    def on_fit_start(self, info: Info) -> None:
        self._best_at = None
        if self._written:
            return
        plan = info.plan
        found = {**flat_hparams("Trainer(hparams=...)", plan.hparams), **self._hparams}
        own = {"seed": plan.seed, "batch_size": plan.batch_size, **numbers_of(info.state.opt_state)}
        rest = {name: value for name, value in own.items() if value is not None and name not in found}
        info.writer.write_hparams({**found, **rest})
        self._written = True

    def on_fit_end(self, info: Info) -> None:
        self._write_best(info)

    def on_exception(self, info: Info, exc: BaseException) -> None:
        self._write_best(info)

    def _write_best(self, info: Info) -> None:
        if self._best_at == info.step:
            return  # the fit had ended, and what came after that raised
        self._best_at = info.step
        best: dict[str, float] = {}
        for name in info.history:
            better = None if name.startswith(_BEST) else info.direction(name)
            found = None if better is None else info.history.best(name, better)
            if found is not None:
                best[f"{_BEST}{name}"] = found[1]
        if best:
            info.writer.write_scalars(info.step, best)

    def state_dict(self) -> dict[str, Any]:
        return {"written": self._written}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._written = bool(state["written"])


def flat_hparams(where: str, hparams: object) -> dict[str, Plain]:
    """Returns hyperparameters with nested names joined, `model/width`.

    Args:
        where: they were given, for messages.
        hparams: values by name.

    Raises:
        TypeError: they are no mapping, or TensorBoard can't hold one of them.
        ValueError: two names are the same once they are joined.
    """
    if not _is_mapping(hparams):
        raise TypeError(
            f"{where}: expected a mapping of names to values, got {type(hparams).__name__}. Of a dataclass it is "
            "dataclasses.asdict(config), of a namespace vars(args)."
        )
    flat: dict[str, Plain] = {}
    for name, value in _items(where, hparams, ""):
        if name in flat:
            raise ValueError(f"{where} has the name {name!r} twice, nested and joined by '/'. Rename one.")
        flat[name] = value
    return flat


def _items(where: str, values: Any, prefix: str) -> Iterator[tuple[str, Plain]]:
    for key, value in values.items():
        if not isinstance(key, str) or not key:
            raise TypeError(f"{where} has the name {key!r} in {prefix or 'it'}; names are non-empty strings.")
        name = f"{prefix}{key}"
        if _is_mapping(value):
            yield from _items(where, value, f"{name}/")
        elif isinstance(value, list | tuple):
            yield from _items(where, {str(index): one for index, one in enumerate(value)}, f"{name}/")
        else:
            yield name, _plain(where, name, value)


def _is_mapping(value: object) -> bool:
    # ml_collections.ConfigDict is a mapping in all but type.
    return isinstance(value, Mapping) or (hasattr(value, "items") and not isinstance(value, type))


def _plain(where: str, name: str, value: Any) -> Plain:
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic) or hasattr(value, "__array__"):
        array = np.asarray(value)
        if array.ndim == 0 and isinstance(item := as_shown(array), bool | int | float | str):
            return item
        what = f"an array of shape {list(array.shape)} and dtype {array.dtype}"
    else:
        what = {type(None): "None"}.get(type(value), f"a {type(value).__name__}")
    cure = "leave it out, or write 'none'" if value is None else "give its name or its settings instead"
    raise TypeError(f"{where}: {name!r} is {what}, which TensorBoard's table can't hold. {_ALLOWED}; {cure}.")
