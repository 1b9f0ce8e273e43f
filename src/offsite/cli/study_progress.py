"""Shows a live table of a running study; imported only if standard error is a terminal."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from offsite.errors import one_line
from offsite.study.grid import GridPoint
from offsite.study.metric import METRICS, Metric
from offsite.study.report.report_tables import LABELS
from offsite.study.run_grid import OnStudyEvent, StudyEvent

_SHOWN = 14  # grid points that are shown at the same time
_TAIL = 4096  # bytes read from the end of a log


@dataclass
class StudyTable:
    """The events of a study so far; rich draws it as a table several times a second."""

    points: Sequence[GridPoint]
    scores: dict[tuple[int, str], str] = field(default_factory=dict)
    event: StudyEvent | None = None
    since: float = field(default_factory=time.monotonic)

    def on_event(self, event: StudyEvent) -> None:
        """Record an event of the study."""
        if event.kind == "stage":
            self.event, self.since = event, time.monotonic()
        elif event.kind == "score":
            self.scores[event.point, event.row] = self._metric.format(event.score or 0.0)
        else:
            self.scores[event.point, event.row] = "[red]failed[/]"

    @property
    def _metric(self) -> Metric:
        """The metric of all grid points; it is the same for all, as a study has one base."""
        return METRICS[self.points[0].metric if self.points else "loss"]

    def __rich__(self) -> RenderableType:
        return Group(self._table(), *self._now())

    def _table(self) -> Table:
        """The scores so far, a line for each grid point and a column for each model (zero-shot, plug-in, ...)."""
        rows = list(self.points[0].rows) if self.points else []
        table = Table(title=self._metric.axis, title_justify="left", title_style="dim")
        for name in ("data set", "compress", "tuning", "seed"):
            table.add_column(name, no_wrap=True)
        for row in rows:
            table.add_column(LABELS[row], justify="right")
        reached = max((point for point, _ in self.scores), default=0)
        first = max(0, min(reached - _SHOWN // 2, len(self.points) - _SHOWN))
        for index, point in list(enumerate(self.points))[first : first + _SHOWN]:
            compress = ", ".join(part for part in (point.compressor.name, point.compressor.placement) if part)
            words = (point.dataset.name, compress, point.method.name)
            scores = [self.scores.get((index, row), "[dim]·[/]") for row in rows]
            table.add_row(*(Text(one_line(word)) for word in words), str(point.seed), *scores)
        more = len(self.points) - _SHOWN
        table.caption = f"and {more} more cells" if more > 0 else None
        return table

    def _now(self) -> list[Text]:
        """The stage that runs now, its duration, and the last line of its log; empty before the first stage."""
        if self.event is None:
            return []
        seconds = round(time.monotonic() - self.since)
        where = f"[{self.event.done}/{self.event.total}] {self.event.description}  {seconds // 60}:{seconds % 60:02}  "
        line = Text(where, style="bold", no_wrap=True, overflow="ellipsis")
        return [line.append(one_line(_last_line(self.event.log)), style="dim")]


@contextlib.contextmanager
def study_table(points: Sequence[GridPoint]) -> Iterator[OnStudyEvent]:
    """Context manager: draws the table on standard error, and yields the callback for events.

    The last state of the table remains on the terminal.
    """
    table = StudyTable(points)
    with Live(table, console=Console(stderr=True), refresh_per_second=4):
        yield table.on_event


def _last_line(log: Path | None) -> str:
    """The last line of a stage's log; empty if there is none."""
    if log is None:
        return ""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return lines[-1].removeprefix("offsite: ") if lines else ""
