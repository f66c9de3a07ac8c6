"""Reports when a step is compiled again, and why. Owns no compilation."""

import logging

from trainkit._core.tree import differences, signature
from trainkit._core.typing import PyTree

_LOG = logging.getLogger("trainkit")
# Another optimizer changes as many leaves as there are; a few say which.
_LISTED = 6


class TraceLog:
    """Notes what each step was traced with; called from inside the traced function, so a step pays nothing."""

    def __init__(self) -> None:
        self._seen: dict[str, list[dict[str, str]]] = {}

    def record(self, step: str, arguments: PyTree) -> None:
        """Notes that `step` is being traced with `arguments`; reports the leaves that changed since the last time."""
        new = signature(arguments)
        seen = self._seen.setdefault(step, [])
        if seen and new not in seen:
            changed = differences(seen[-1], new)
            listed = [*changed[:_LISTED], *([f"{len(changed) - _LISTED} more"] if changed[_LISTED:] else [])]
            _LOG.warning(
                "the %s step is compiled again (%d times now) because its arguments changed: %s",
                step,
                len(seen) + 1,
                "; ".join(listed),
            )
        if new not in seen:
            seen.append(new)

    def count(self, step: str) -> int:
        """Returns how many different signatures `step` was traced with."""
        return len(self._seen.get(step, ()))
