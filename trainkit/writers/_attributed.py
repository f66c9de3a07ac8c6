"""Who wrote what at which step. Owns the rule that one name is written once at one step; no output."""

import collections
from collections.abc import Iterable, Mapping
from typing import Any

from trainkit.writers._alike import AlikeWriter, Kind
from trainkit.writers._writer import MetricWriter

_STEPS_KEPT = 16
"""Values arrive at most an interval late, so a name written twice is found among the latest few steps."""


class Ledger:
    """The names written at the latest steps and their owners.

    One name is one series in TensorBoard, whatever its kind, so a scalar and an image may not share one
    either. It holds the names of the 16 steps begun last; noting a name takes constant time.

    Example:
        >>> ledger = Ledger()
        >>> ledger.note("EMA", 10, ["weights/norm"])
        >>> ledger.note("LearningRate", 10, ["lr"])
    """

    def __init__(self) -> None:
        self._owners: collections.OrderedDict[int, dict[str, str]] = collections.OrderedDict()
        self._hparams_owner: str | None = None

    def note(self, owner: str, step: int, names: Iterable[str]) -> None:
        """Notes that `owner` writes these names at this step.

        Args:
            owner: name of the writing callback.
            step: updates completed.
            names: names in the log.

        Raises:
            ValueError: one was written at this step before; none of `names` is noted then.
            TypeError: a name is not a str.
        """
        names = tuple(names)
        owners = self._owners.get(step, {})
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"{owner} wrote under the name {name!r}; the names in a log are str.")
            if name in owners:
                raise ValueError(_twice(name, step, owners[name], owner))
        self._owners.setdefault(step, owners).update(dict.fromkeys(names, owner))
        while len(self._owners) > _STEPS_KEPT:
            self._owners.popitem(last=False)

    def note_hparams(self, owner: str) -> None:
        """Notes that `owner` writes the hyperparameters of the run.

        Args:
            owner: name of the writing callback.

        Raises:
            ValueError: they were written before.
        """
        if self._hparams_owner is not None:
            raise ValueError(
                f"the hyperparameters of a run are written once; {self._hparams_owner} wrote them, then "
                f"{owner} did. Join them in one write_hparams."
            )
        self._hparams_owner = owner

    def names(self, step: int) -> list[str]:
        """Returns the names written at `step`."""
        return sorted(self._owners.get(step, ()))

    def rewind(self, step: int) -> None:
        """Forgets the steps after `step`, which a run that was set back to it will write again.

        Args:
            step: updates completed.
        """
        for later in [known for known in self._owners if known > step]:
            del self._owners[later]


class Attributed(AlikeWriter):
    """A view of a shared writer for one owner, such as a callback.

    A name that was written at the same step before, by whomever, is refused with a ValueError.

    Args:
        writer: the shared writer.
        owner: what errors call the owner.
        ledger: shared by all the views of `writer`.

    Example:
        >>> from trainkit.writers import ConsoleWriter
        >>> view = Attributed(ConsoleWriter(), "EMA", Ledger())
        >>> view.write_scalars(10, {"weights/norm": 2.0})
        [step 10] weights/norm=2
    """

    def __init__(self, writer: MetricWriter, owner: str, ledger: Ledger) -> None:
        self._writer = writer
        self._owner = owner
        self._ledger = ledger

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes the hyperparameters; raises ValueError where they were written before."""
        self._ledger.note_hparams(self._owner)
        self._writer.write_hparams(hparams)

    def flush(self) -> None:
        """Flushes the shared writer."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes the shared writer and leaves it open for the other owners."""
        self._writer.flush()

    def _write(self, kind: Kind, step: int, values: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Writes values of any kind, unless one of the names was written at this step before."""
        self._ledger.note(self._owner, int(step), values)
        getattr(self._writer, f"write_{kind}")(step, values, *args, **kwargs)


def _twice(name: str, step: int, first: str, second: str) -> str:
    who, cure = f"by {first}, then by {second}", "rename one of the two"
    if first == second:
        who, cure = f"both times by {first}", "write it later or rename one"
    return f"{name!r} was written twice at step {step}, {who}. A name is written once at one step: {cure}."
