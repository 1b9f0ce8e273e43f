"""The report of a study: results.json, report.md, report.html (one file that opens offline) and plots."""

import base64
import html
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from offsite.errors import UsageError
from offsite.storage.files import replace_file
from offsite.study.report.plots import Plot, draw
from offsite.study.report.report_tables import Table, failures, tables
from offsite.study.report.results import Results


def write_report(results: Results, folder: Path, sheets: Sequence[Plot] = ()) -> tuple[list[Path], str | None]:
    """Write the report of a study: results.json, report.md, report.html and the plots.

    Args:
        results: from `collect`.
        folder: the study's folder.
        sheets: contact sheets, which show test pictures with the classes that models predicted.

    Returns:
        The written files, and advice to the user if plots could not be drawn, else None.

    Raises:
        StorageError: a file cannot be written.
    """
    files = {"results.json": f"{json.dumps(strict(asdict(results)), indent=1, allow_nan=False)}\n"}
    plots: list[Plot] = []
    advice = None
    try:
        plots = draw(results, folder)
    except UsageError as error:  # the rest of the report needs no plots
        advice = f"no plots: {error.what}; {error.next_step}"
    plots += sheets
    made = tables(results)
    files["report.md"] = markdown(results, made, plots, folder)
    files["report.html"] = page(results, made, plots)
    for name, content in files.items():
        replace_file(folder / name, content.encode())
    return [*(folder / name for name in files), *(plot.file for plot in plots)], advice


def strict(value: Any) -> Any:
    """Copy a value for strict JSON: floats that are infinite or NaN become None, tuples become lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: strict(part) for name, part in value.items()}
    return [strict(part) for part in value] if isinstance(value, list | tuple) else value


def _facts(results: Results) -> str:
    """A sentence about the study: its base, number of grid points, seeds and environment."""
    machine = ", ".join(f"{name} {value}" for name, value in results.environment.items())
    seeds = sorted({point.seed for point in results.cells})
    return (
        f"Base: {results.base}. {len(results.cells)} cells, "
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}. {machine}."
    )


def _tested(results: Results) -> str:
    """A sentence for each data set with the number of test rows and labelled tokens that were scored."""
    found = {point.dataset: row for point in results.cells for row in point.scores.values()}
    if results.primary == "accuracy":
        return " ".join(f"{name}: {row.rows:,} test pictures." for name, row in found.items())
    return " ".join(f"{name}: {row.rows:,} test rows, {row.tokens:,} labelled tokens." for name, row in found.items())


def markdown(results: Results, made: Sequence[Table], plots: Sequence[Plot], folder: Path) -> str:
    """The report as Markdown text; plots are links to files, relative to `folder`."""
    parts = [f"# {results.title}", results.about, _facts(results), _tested(results)]
    for table in made:
        rule = ["---"] * table.keys + ["---:"] * (len(table.head) - table.keys)
        lines = [_line(table.head), _line(rule), *(_line(line) for line in table.lines)]
        parts += [f"## {table.title}", table.note, "\n".join(lines)]
    for plot in plots:
        parts += [f"## {plot.title}", plot.description, f"![{plot.title}]({plot.file.relative_to(folder).as_posix()})"]
    if failed := failures(results):
        parts += ["## What failed", "\n".join(f"- {' '.join(line.split())}" for line in failed)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _line(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def page(results: Results, made: Sequence[Table], plots: Sequence[Plot]) -> str:
    """The report as the text of one HTML file that contains its plots and needs no other file."""
    body = [f"<h1>{html.escape(results.title)}</h1>"]
    body += [f"<p>{html.escape(text)}</p>" for text in (results.about,) if text]
    body += [f'<p class="facts">{html.escape(text)}</p>' for text in (_facts(results), _tested(results)) if text]
    if failed := failures(results):
        items = "".join(f"<li>{html.escape(line)}</li>" for line in failed)
        body.append(f'<section class="failed"><h2>What failed</h2><ul>{items}</ul></section>')
    body += [_html_table(table) for table in made]
    for plot in plots:
        image = base64.b64encode(plot.file.read_bytes()).decode()
        body.append(
            f"<section><h2>{html.escape(plot.title)}</h2><p>{html.escape(plot.description)}</p>"
            f'<img alt="{html.escape(plot.title)}" src="data:image/png;base64,{image}"></section>'
        )
    return _PAGE.format(title=html.escape(results.title), body="\n".join(body))


def _html_table(table: Table) -> str:
    """A table of the report as HTML, with its title and note."""
    head = "".join(f"<th{_kind(i, table)}>{html.escape(cell)}</th>" for i, cell in enumerate(table.head))
    lines = "".join(
        "<tr>"
        + "".join(
            f"<td{_kind(i, table)}>{html.escape(cell)}</td>"
            for i, cell in enumerate(_without_repeats(line, above, table))
        )
        + "</tr>"
        for line, above in zip(table.lines, (None, *table.lines), strict=False)
    )
    return (
        f"<section><h2>{html.escape(table.title)}</h2><p>{html.escape(table.note)}</p>"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div></section>'
    )


def _kind(column: int, table: Table) -> str:
    """The HTML class attribute for the cells of a column; empty if they have none."""
    words = [] if column < table.keys else ["n"]
    words += ["plug"] if table.head[column] == "plug-in" else []
    return f' class="{" ".join(words)}"' if words else ""


def _without_repeats(line: Sequence[str], above: Sequence[str] | None, table: Table) -> list[str]:
    """The cells of a table's line; the data set's name is empty if the line `above` has the same name."""
    return ["" if above is not None and line[0] == above[0] else line[0], *line[1:]] if table.keys else list(line)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ --text: #1d1d1f; --quiet: #5c5f66; --back: #ffffff; --line: #dcdfe4; --band: #f5f6f8; --plug: #0072b2;
  --bad: #b3400a; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --text: #e7e8ea; --quiet: #a2a6ad; --back: #17181b; --line: #34373d; --band: #1f2125; --plug: #6fb8e6;
    --bad: #ff9a66; }}
}}
body {{ margin: 2.5rem auto; max-width: 76rem; padding: 0 1.5rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.6rem; margin: 0 0 .5rem; }}
h2 {{ font-size: 1.1rem; margin: 2.2rem 0 .3rem; }}
p {{ margin: .3rem 0 .8rem; max-width: 60rem; }}
section > p, .facts {{ color: var(--quiet); font-size: .9rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .88rem; }}
th, td {{ padding: .35rem .75rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }}
th {{ font-weight: 600; vertical-align: bottom; white-space: normal; }}
tbody tr:hover {{ background: var(--band); }}
.n {{ text-align: right; font-variant-numeric: tabular-nums; }}
.plug {{ color: var(--plug); font-weight: 600; }}
.failed {{ border-left: 4px solid var(--bad); padding-left: 1rem; }}
.failed li {{ white-space: pre-line; }}
img {{ max-width: 100%; background: #ffffff; border-radius: 6px; padding: .5rem; box-sizing: border-box; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
