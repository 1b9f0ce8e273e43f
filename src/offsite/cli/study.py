"""The command study, which plays both parties on one machine for a grid of settings, and full-fine-tuning."""

import contextlib
import io
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from offsite.cli import flags, terminal
from offsite.errors import OffsiteError, UsageError, one_line

if TYPE_CHECKING:
    from offsite.study.grid import GridPoint
    from offsite.study.recipe import Recipe
    from offsite.study.report.results import Results
    from offsite.study.run_command import Outcome, Words
    from offsite.study.run_grid import OnStudyEvent, StudyEvent

_Folder = Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="the study's folder, new or begun")]


def study(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help=r"the grid: bases, data, [\[pack]], [\[tune]]")],
    out: _Folder = None,
    data_root: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="where the recipe's data files are looked for first")
    ] = None,
    base: Annotated[Path | None, typer.Option(metavar="FOLDER", help="a base in place of the recipe's")] = None,
    check: Annotated[bool, typer.Option("--check", help="try every setting on a tiny random model, and stop")] = False,
    report_only: Annotated[bool, typer.Option("--report-only", help="run nothing; report what was run so far")] = False,
    as_json: flags.JsonFlag = False,
) -> None:
    """Play both parties through pack, verify, tune and plug-in for every cell of a grid, and compare the models.

    For an image encoder the data sets are pictures, and models are compared by accuracy instead of loss.

    Every stage runs in its own process, and its result is kept under a digest of its inputs: an interrupted study
    continues, and a stage with unchanged inputs does not run again. Results: results.json, report.md, report.html,
    plots/.

    Example:
      offsite study recipes/small/table1.toml --data-root data/ --out runs/table1
    """
    if check and report_only:
        raise UsageError(
            "--check runs nothing of the study, and --report-only reports what was run", next_step="give one of the two"
        )
    from offsite.study.recipe import load_recipe

    loaded = load_recipe(recipe, data_root=data_root, base=base)
    if check:
        _check(loaded, as_json=as_json)
        return
    if out is None:
        raise UsageError("there is nowhere to put the results", next_step="name a folder with --out")
    from offsite.study.grid import expand_grid
    from offsite.study.prepare_study import prepare
    from offsite.study.run_grid import Runner, list_stages, run_grid
    from offsite.study.run_lock import lock_study

    workspace, rows = prepare(loaded, out, terminal.say)
    points = expand_grid(loaded, workspace, rows)
    failed = 0
    with contextlib.nullcontext() if report_only else lock_study(out):
        try:
            if not report_only:
                with _showing_study_progress(points) as on_event:
                    runner = Runner(workspace, on_event, len(list_stages(points)))
                    failed = run_grid(points, runner, keep_models=loaded.keep_models)
        finally:  # after a failure too, report the results so far
            results = _report(loaded, points, out)
    show_results(results, out, as_json=as_json)
    if failed:
        error = OffsiteError(
            f"{failed} of {len(points)} cells failed",
            reasons=_failures(results),
            next_step="correct what failed and run the same command again: what is done is not repeated",
        )
        _end(error, as_json=as_json)


def full_fine_tuning(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="base checkpoint folder")],
    data: Annotated[Path, typer.Option(metavar="FILE", help="rows to train on")],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="new folder for the tuned checkpoint")],
    eval_data: Annotated[Path | None, typer.Option(metavar="FILE", help="held-out rows to validate on")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue an interrupted run")] = False,
    config: flags.ConfigFlag = None,
    as_json: flags.JsonFlag = False,
) -> None:
    """Tune every weight of a base, so that a study can compare plug-ins with it; this needs the files of both parties.

    Settings come from table [tune] of --config.

    Example:
      offsite full-fine-tuning base/ --data train.jsonl --out tuned/
    """
    from offsite.config import TuneSpec

    spec = flags.settings(TuneSpec, config, {})
    from offsite.protocol.artifacts import Base
    from offsite.study.full_fine_tuning import full_fine_tuning as run

    with terminal.showing_progress() as progress:
        tuned = run(Base(base), data, out, spec, eval_data=eval_data, resume=resume, progress=progress)
    terminal.show({"kind": "checkpoint", "folder": str(tuned.folder)}, as_json=as_json)


def _report(recipe: "Recipe", points: "list[GridPoint]", out: Path) -> "Results":
    """Collect the results of a study, and write its report; prints the paths of the written files."""
    from offsite.study.report.contact_sheet import sheets
    from offsite.study.report.results import collect
    from offsite.study.report.write_report import write_report

    results = collect(recipe, points, out)
    files, advice = write_report(results, out, sheets(points, out))
    if advice:
        terminal.say(advice)
    terminal.say(f"wrote {', '.join(str(file) for file in files)}")
    return results


def show_results(results: "Results", folder: Path, *, as_json: bool) -> None:
    """Print the results of a study: JSON, or the tables of its report but for that of the costs.

    Args:
        results: the results.
        folder: the study's folder.
        as_json: whether to print JSON.
    """
    from dataclasses import asdict

    if as_json:
        typer.echo(terminal.render_json(asdict(results)))
    else:
        _print(results, folder)


def _print(results: "Results", out: Path) -> None:
    """Print the tables of a study's report on standard output, except the last one, which is about costs."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from offsite.study.report.report_tables import tables

    wide = None if sys.stdout.isatty() else 240  # a file has no width of its own
    console = Console(highlight=False, width=wide)
    for one in tables(results)[:-1]:  # the last table, of costs, is in the report only
        # a column of settings that is the same in every line is left out
        columns = [
            i for i in range(len(one.head)) if i == 0 or i >= one.keys or len({line[i] for line in one.lines}) > 1
        ]
        shown = Table(title=one.title, title_justify="left", title_style="bold")
        for i in columns:
            style = "bold" if one.head[i] == "plug-in" else ""
            shown.add_column(one.head[i], justify="left" if i < one.keys else "right", style=style, overflow="fold")
        for line in one.lines:
            shown.add_row(*(Text(one_line(line[i])) for i in columns))
        console.print(shown)
        console.print(Text(one.note, style="dim"))
        console.print()
    terminal.hint(f"next: open {out / 'report.html'}")


def _failures(results: "Results") -> list[str]:
    """A line of text for each model of a grid point (zero-shot, plug-in, ...) whose score failed."""
    from offsite.study.report.report_tables import failures

    return [" ".join(line.split()) for line in failures(results)]


@contextlib.contextmanager
def _showing_study_progress(points: "list[GridPoint]") -> "Iterator[OnStudyEvent]":
    """Context manager: yield a callback that shows a study's events, in a live table on a terminal, else as lines."""
    if not sys.stderr.isatty():
        yield _print_event
        return
    from offsite.cli.study_progress import study_table

    with study_table(points) as on_event:
        yield on_event


def _print_event(event: "StudyEvent") -> None:
    """Print an event of a study as a line on standard error."""
    where = f"[{event.done}/{event.total}]"
    if event.kind == "score":
        terminal.say(f"{where} cell {event.point + 1} {event.row}: {event.score_text}")
    elif event.kind == "failure":
        terminal.say(f"{where} cell {event.point + 1} {event.row} FAILED: {event.description}")
    else:
        terminal.say(f"{where} {event.description}")


def _check(recipe: "Recipe", *, as_json: bool) -> None:
    """Check a recipe on a tiny model, print the result, and end the command with an error if a stage failed."""
    from offsite.study.check_recipe import check

    tried = check(recipe, run_in_this_process, _print_event if not as_json else lambda _: None)
    facts = {
        "recipe": str(recipe.file),
        "cells": recipe.grid_size,
        "tried_cells": tried.points,
        "tried_stages": tried.stages,
        "failed": list(tried.failures),
        "missing": list(tried.missing),
    }
    terminal.show(facts, as_json=as_json)
    if tried.failures:
        error = OffsiteError(
            f"{len(tried.failures)} scores of the recipe {recipe.file} cannot be had",
            reasons=tried.failures,
            next_step="correct the recipe; nothing was kept",
        )
        _end(error, as_json=as_json)
    for line in tried.missing:
        terminal.hint(f"not there yet: {line}")
    terminal.hint_command("study", recipe.file, "--out", "runs/")


def _end(error: OffsiteError, *, as_json: bool) -> NoReturn:
    """End the command with this error after the result was printed.

    With --json the error goes to standard error only, as standard output must hold a single JSON document.
    """
    if not as_json:
        raise error
    terminal.say(str(error))
    raise typer.Exit(error.exit_code)


def run_in_this_process(words: "Words", log: Path) -> "Outcome":
    """Run a command inside this process, for the stages of a check, which are shorter than starting Python.

    Args:
        words: the words after `offsite`.
        log: the file for the command's messages.

    Raises:
        OffsiteError: the command failed; the error has its exit code.
    """
    from offsite.cli import main
    from offsite.study.run_command import Outcome, failed

    started = time.monotonic()
    said = io.StringIO()
    with (
        log.open("w", encoding="utf-8") as messages,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(messages),
    ):
        code = main([*(str(word) for word in words), "--json"])
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise failed(words, code, "the check", said.getvalue().encode())
    return Outcome(json.loads(said.getvalue()), round(time.monotonic() - started, 2), None)
