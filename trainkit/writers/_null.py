"""The writer that writes nothing: what stands in where there is no log."""

from collections.abc import Mapping
from typing import Any

from trainkit.writers._alike import AlikeWriter, Kind


class NullWriter(AlikeWriter):
    """Takes everything and keeps nothing.

    Example:
        >>> NullWriter().write_scalars(1, {"train/loss": 0.5})
    """

    def _write(self, kind: Kind, step: int, values: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Writes nothing."""

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes nothing."""

    def flush(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""
