"""Shows progress bars; imported only if standard error is a terminal, as rich takes long to import."""

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

from offsite.cli.terminal import facts_in_words, printable
from offsite.progress import Event, Progress


class _Facts(ProgressColumn):
    """The last column of a bar, with loss, speed and time left; it is cut off on a narrow terminal."""

    def render(self, task: Task) -> Text:
        """The text of the column: the facts of the last event, on one line."""
        return Text(printable(task.fields["facts"]), no_wrap=True, overflow="ellipsis")


@contextlib.contextmanager
def bars() -> Iterator[Progress]:
    """Context manager: yield a callback that shows a progress bar for each stage on standard error."""

    def whole() -> Column:
        return Column(no_wrap=True)

    columns = (
        TextColumn("{task.description}", markup=False, table_column=whole()),  # a path may look like markup
        BarColumn(bar_width=16, table_column=whole()),
        MofNCompleteColumn(table_column=whole()),
        TimeElapsedColumn(table_column=whole()),
        _Facts(),
    )
    with Bars(*columns, console=Console(stderr=True)) as display:
        tasks: dict[str, TaskID] = {}

        def advance(event: Event) -> None:
            if event.stage not in tasks:
                for task in display.tasks:  # stages run one after another, so stages without a total have ended
                    if task.total is None:
                        display.update(task.id, total=1, completed=1)
                tasks[event.stage] = display.add_task(printable(event.stage), total=event.total, facts="")
            display.update(tasks[event.stage], completed=event.done, total=event.total, facts=facts_in_words(event))

        yield advance
