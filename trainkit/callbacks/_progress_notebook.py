"""How the progress of a fit looks in a notebook: one display, drawn over itself. Owns no clock and no numbers.

It goes through IPython's display machinery alone, so that every front end shows it, and needs no widgets.
"""

import dataclasses
import html
import sys
from typing import Any

from trainkit.callbacks._progress_view import Report, line

_REDRAW_SECONDS = 0.25
_TEXT = "font-family:monospace;font-size:12px;line-height:1.6;max-width:64em"
_HEAD = "display:flex;gap:1em;align-items:center;white-space:nowrap"
# Grey of half its strength and a middle blue are seen on light pages and on dark ones.
_TRACK = "flex:1;min-width:6em;height:8px;border-radius:4px;background:rgba(128,128,128,.3);overflow:hidden"
_CELL = "padding:0 1em 0 0;text-align:left;border:none;background:none"
_DONE, _BROKEN = "#1e88e5", "#e53935"


def in_notebook() -> bool:
    """Says whether this runs in the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


class Notebook:
    """A bar with the newest metrics below it, in the output of the cell that runs."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._last = -_REDRAW_SECONDS
        self._drawn: Report | None = None
        self._report: Report | None = None

    def show(self, report: Report) -> None:
        """Draws, unless it did a moment ago."""
        self._report = report
        if report.final or report.elapsed - self._last >= _REDRAW_SECONDS:
            self._draw(report)

    def close(self) -> None:
        """Leaves the last picture; where the fit was broken off it says so."""
        report, self._report = self._report, None
        if report is not None and not report.final:
            self._draw(dataclasses.replace(report, activity="broken off", speed=None))

    def _draw(self, report: Report) -> None:
        from IPython.display import display  # pyright: ignore[reportMissingImports]

        self._last = report.elapsed
        try:
            if self._handle is None:
                self._handle = display(Picture(report), display_id=True)
            else:
                self._handle.update(Picture(report))
        except Exception as error:  # of the front end: whatever it is, the fit goes on
            raise OSError(f"{type(error).__name__}: {error}") from error


class Picture:
    """What a notebook shows of a report: HTML, or a line of text where it can't."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def __repr__(self) -> str:
        return line(self._report)

    def _repr_html_(self) -> str:
        report = self._report
        parts = [report.step_text, report.activity or report.speed_text, report.elapsed_text, report.eta_text]
        said = "".join(f"<span>{html.escape(part)}</span>" for part in parts if part)
        head = f"<b>{html.escape(report.epoch_text)}</b>{self._bar()}{said}"
        return f'<div style="{_TEXT}"><div style="{_HEAD}">{head}</div>{self._table()}</div>'

    def _bar(self) -> str:
        report = self._report
        if report.steps is None and not report.final:
            return ""  # nobody knows how long it is
        share = 100.0 * report.step / max(report.steps or report.step, 1)
        colour = _BROKEN if report.activity == "broken off" else _DONE
        return (
            f'<div style="{_TRACK}"><div style="width:{min(share, 100.0):.1f}%;height:100%;background:{colour}">'
            "</div></div>"
        )

    def _table(self) -> str:
        metrics = self._report.metrics
        names = list(dict.fromkeys(name for values in metrics.values() for name in values))
        if not names:
            return ""
        rows = [["", *names]]
        for source, values in metrics.items():
            rows.append([source, *(f"{values[name]:.4g}" if name in values else "" for name in names)])
        cells = ("".join(f'<td style="{_CELL}">{html.escape(cell)}</td>' for cell in row) for row in rows)
        return f'<table style="border:none">{"".join(f"<tr>{row}</tr>" for row in cells)}</table>'
