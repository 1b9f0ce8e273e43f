"""Shows progress bars; imported only if standard error is a terminal, as rich takes long to import."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

from offsite.cli.terminal import facts_in_words
from offsite.errors import one_line
from offsite.progress import Event, Progress

_WIDEST_NAME = 30  # characters of a stage's name, so that time left and the first fact have room in 80 columns
_ROOMY = 100  # columns of a terminal on which names are not cut
_LEFT = "left"  # the fact with the time left, which has a column of its own


class _Time(ProgressColumn):
    """The time left of a stage whose length is known, else the time that it has taken."""

    def render(self, task: Task) -> Text:
        """The text of the column, such as "0:12 left" or "0:07"."""
        left = task.fields["left"]
        if left is None and task.total and not task.finished and task.time_remaining is not None:
            left = _clock(task.time_remaining)
        if left is not None and not task.finished:
            return Text(f"{left} left", no_wrap=True)
        return Text(_clock((task.finished_time if task.finished else task.elapsed) or 0), no_wrap=True)


def _clock(seconds: float) -> str:
    """Seconds as text, such as "1:07" or "2:03:07"."""
    whole = round(seconds)
    minutes = f"{whole // 60 % 60:02}" if whole >= 3600 else f"{whole // 60}"
    return f"{whole // 3600}:{minutes}:{whole % 60:02}" if whole >= 3600 else f"{minutes}:{whole % 60:02}"


class _Facts(ProgressColumn):
    """The last column of a bar, with the loss first; it is cut off on a narrow terminal."""

    def render(self, task: Task) -> Text:
        """The text of the column: the facts of the last event, on one line."""
        return Text(one_line(task.fields["facts"]), no_wrap=True, overflow="ellipsis")


@contextlib.contextmanager
def bars(console: Console | None = None) -> Iterator[Progress]:
    """Context manager: yield a callback that shows a progress bar for each stage.

    Args:
        console: where they are shown; None: on standard error.
    """

    shown_on = console or Console(stderr=True)
    roomy = shown_on.width >= _ROOMY

    def whole(widest: int | None = None) -> Column:
        return Column(no_wrap=True, overflow="ellipsis", max_width=widest)

    columns = (
        # a path may look like markup
        TextColumn("{task.description}", markup=False, table_column=whole(None if roomy else _WIDEST_NAME)),
        BarColumn(bar_width=10, table_column=whole()),
        MofNCompleteColumn(table_column=whole()),
        _Time(table_column=whole()),
        _Facts(),
    )
    with Bars(*columns, console=shown_on) as display:
        tasks: dict[str, TaskID] = {}

        def advance(event: Event) -> None:
            if event.stage not in tasks:
                for task in display.tasks:  # stages run one after another, so stages without a total have ended
                    if task.total is None:
                        display.update(task.id, total=1, completed=1)
                tasks[event.stage] = display.add_task(one_line(event.stage), total=event.total, facts="", left=None)
            shown = {name: value for name, value in event.facts.items() if name != _LEFT}
            display.update(
                tasks[event.stage],
                completed=event.done,
                total=event.total,
                facts=one_line(facts_in_words(replace(event, facts=shown))),
                left=event.facts.get(_LEFT),
            )

        yield advance
