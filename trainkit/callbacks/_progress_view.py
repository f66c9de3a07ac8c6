"""How the progress of a fit looks: `Bar` on a terminal, `Lines` elsewhere. Owns no clock and no numbers.

In a notebook it is `_progress_notebook`'s affair.
"""

import dataclasses
import datetime
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    import rich.console

_LINE_SECONDS = 10.0
_EPOCH_LINE_SECONDS = 1.0
_REDRAW_SECONDS = 0.25


@dataclasses.dataclass(frozen=True)
class Report:
    """How far a fit is.

    Attributes:
        epoch: passes begun.
        epochs: epoch at which the fit ends, None where it was given in steps.
        step: updates completed.
        steps: step at which the fit ends, None while it is not known.
        speed: updates a second, None while it is not known.
        elapsed: seconds since the fit began.
        activity: what is done instead of training, "" for nothing.
        metrics: newest values by source and metric, e.g. `{"train": {"loss": 0.5}}`.
        end_of_epoch: a pass was completed just now.
        final: the fit is over.
    """

    epoch: int
    epochs: int | None
    step: int
    steps: int | None
    speed: float | None
    elapsed: float
    activity: str
    metrics: Mapping[str, Mapping[str, float]]
    end_of_epoch: bool
    final: bool

    @property
    def epoch_text(self) -> str:
        return f"epoch {self.epoch}" if self.epochs is None else f"epoch {self.epoch}/{self.epochs}"

    @property
    def step_text(self) -> str:
        return f"{self.step}" if self.steps is None else f"{self.step}/{self.steps}"

    @property
    def speed_text(self) -> str:
        if not self.speed:
            return ""
        if self.speed < 1:
            return f"{1 / self.speed:.1f} s/step"
        return f"{self.speed:.{0 if self.speed >= 100 else 1}f} steps/s"

    @property
    def elapsed_text(self) -> str:
        return _duration(self.elapsed)

    @property
    def eta_text(self) -> str:
        if not self.speed or self.steps is None or self.final:
            return ""
        return f"eta {_duration((self.steps - self.step) / self.speed)}"


class Lines:
    """One line of plain text now and then.

    Args:
        stream: where to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = 0.0

    def show(self, report: Report) -> None:
        """Writes a line if it is time for one."""
        wait = _EPOCH_LINE_SECONDS if report.end_of_epoch else _LINE_SECONDS
        # The end of the last pass is the end of the fit, which has a line of its own.
        last_pass = report.end_of_epoch and report.step == report.steps
        if (last_pass or report.elapsed - self._last < wait) and not report.final:
            return
        self._last = report.elapsed
        self._stream.write(line(report) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Does nothing."""


def line(report: Report) -> str:
    """Returns a report as a line of plain text."""
    head = [report.epoch_text, f"step {report.step_text}", report.activity or report.speed_text]
    metrics = [f"{source} {_numbers(values, ' ')}" for source, values in report.metrics.items()]
    parts = [*head, report.elapsed_text, report.eta_text, *metrics]
    return "  ".join(part for part in parts if part)


class Bar:
    """A bar drawn over itself, with a line of metrics per source below it. What is printed goes above.

    Args:
        stream: a terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(file=stream)
        # A stream that is redirected to a file must keep its prints, so only terminals are taken over.
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        self._last = self._last_activity = -_REDRAW_SECONDS
        self._activity = ""
        self._live.start()

    def show(self, report: Report) -> None:
        """Draws, unless it did a moment ago: passes of a few milliseconds would spend their time on it."""
        begins, ends = report.activity and not self._activity, self._activity and not report.activity
        last = self._last_activity if begins else self._last
        if report.elapsed - last < _REDRAW_SECONDS and not (ends or report.final):
            return
        self._last, self._activity = report.elapsed, report.activity
        if begins:
            self._last_activity = report.elapsed
        self._live.update(self._draw(report), refresh=True)

    def close(self) -> None:
        """Leaves the last picture and shows the cursor again."""
        self._live.stop()

    def _draw(self, report: Report) -> "rich.console.RenderableType":
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        total = max(report.steps, 1) if report.steps is not None else None
        if total is None and report.final:
            total = max(report.step, 1)
        bar = ProgressBar(
            total=total, completed=report.step, pulse=total is None, animation_time=report.elapsed
        )
        head = Table.grid(padding=(0, 1), expand=True)
        # Widths that hold what comes, so that the bar keeps its length while the numbers change.
        head.add_column(no_wrap=True, min_width=7 + 2 * len(str(report.epochs or "")), style="bold")
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right", min_width=1 + 2 * len(str(report.steps or "")))
        head.add_column(no_wrap=True, justify="right", min_width=12, style="cyan")
        head.add_column(no_wrap=True, justify="right", min_width=7)
        head.add_column(no_wrap=True, justify="right", min_width=0 if report.final else 11, style="magenta")
        doing = Text(report.activity, style="yellow") if report.activity else report.speed_text
        head.add_row(report.epoch_text, bar, report.step_text, doing, report.elapsed_text, report.eta_text)
        width = max(map(len, report.metrics), default=0)
        overflow = "ellipsis" if self._console.encoding.startswith("utf") else "crop"
        rows = [
            Text.assemble(
                (f"  {source:<{width}}", "dim"),
                f"  {_numbers(values, '  ')}",
                no_wrap=True,
                overflow=overflow,
            )
            for source, values in report.metrics.items()
        ]
        return Group(head, *rows)


def _numbers(values: Mapping[str, float], separator: str) -> str:
    return separator.join(f"{name} {value:.4g}" for name, value in values.items())


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=int(max(seconds, 0.0))))
