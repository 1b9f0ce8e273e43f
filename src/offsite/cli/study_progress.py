"""The live table of a study; imported only where there is a terminal to draw it on."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from offsite.cli.terminal import printable
from offsite.study.grid import Cell
from offsite.study.metric import PRIMARIES, Primary
from offsite.study.report.tables import LABELS
from offsite.study.run import News, Tell

_SHOWN = 14  # cells at once
_TAIL = 4096  # bytes of a log that are looked at


@dataclass
class Board:
    """What a study has said so far, drawn anew a few times a second."""

    cells: Sequence[Cell]
    scores: dict[tuple[int, str], str] = field(default_factory=dict)
    news: News | None = None
    since: float = field(default_factory=time.monotonic)

    def tell(self, news: News) -> None:
        """Take in what happened."""
        if news.what == "stage":
            self.news, self.since = news, time.monotonic()
        elif news.what == "score":
            self.scores[news.cell, news.row] = self._primary.shown(news.score or 0.0)
        else:
            self.scores[news.cell, news.row] = "[red]failed[/]"

    @property
    def _primary(self) -> Primary:
        """A study has one base, and so one measure."""
        return PRIMARIES[self.cells[0].primary if self.cells else "loss"]

    def __rich__(self) -> RenderableType:
        return Group(self._table(), *self._now())

    def _table(self) -> Table:
        rows = list(self.cells[0].rows) if self.cells else []
        table = Table(title=self._primary.axis, title_justify="left", title_style="dim")
        for name in ("data set", "compress", "tuning", "seed"):
            table.add_column(name, no_wrap=True)
        for row in rows:
            table.add_column(LABELS[row], justify="right")
        reached = max((cell for cell, _ in self.scores), default=0)
        first = max(0, min(reached - _SHOWN // 2, len(self.cells) - _SHOWN))
        for index, cell in list(enumerate(self.cells))[first : first + _SHOWN]:
            compress = ", ".join(part for part in (cell.compressor.name, cell.compressor.placement) if part)
            words = (cell.dataset.name, compress, cell.method.name)
            scores = [self.scores.get((index, row), "[dim]·[/]") for row in rows]
            table.add_row(*(Text(printable(word)) for word in words), str(cell.seed), *scores)
        more = len(self.cells) - _SHOWN
        table.caption = f"and {more} more cells" if more > 0 else None
        return table

    def _now(self) -> list[Text]:
        if self.news is None:
            return []
        seconds = round(time.monotonic() - self.since)
        where = f"[{self.news.done}/{self.news.total}] {self.news.says}  {seconds // 60}:{seconds % 60:02}  "
        line = Text(where, style="bold", no_wrap=True, overflow="ellipsis")
        return [line.append(printable(_last_line(self.news.log)), style="dim")]


@contextlib.contextmanager
def board(cells: Sequence[Cell]) -> Iterator[Tell]:
    """Draw on standard error until the block ends; the last state stays on the screen."""
    drawn = Board(cells)
    with Live(drawn, console=Console(stderr=True), refresh_per_second=4):
        yield drawn.tell


def _last_line(log: Path | None) -> str:
    """What the running stage said last."""
    if log is None:
        return ""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return lines[-1].removeprefix("offsite: ") if lines else ""
