"""The command compare, which scores several models on the same rows and says which differences are more than noise."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offsite.cli import flags, terminal, verified_models
from offsite.cli.setting_flags import FlagValues
from offsite.errors import one_line

if TYPE_CHECKING:
    from offsite.evaluation.compare import Comparison
    from offsite.evaluation.differences import Difference, RowDifference

_ACCURACIES = ("accuracy", "accuracy_norm")
_MOST_LETTERS = 600  # most characters of a row that are printed
_MEANING = {
    "better": "better",
    "worse": "worse",
    "noise": "noise: the interval includes zero",
    "equal": "equal on every row",
    "too few rows": "too few rows differ to say",
}


def compare(
    context: typer.Context,
    flag_values: FlagValues,
    models: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL...", help="bases, bundles, plug-ins; an adapter is put on the model before it"),
    ],
    data: Annotated[list[Path], flags.DATA_OPTION],
    probe: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="pictures to fit a linear probe on encoders without a head")
    ] = None,
    rows: Annotated[
        int, typer.Option("--rows", metavar="N", min=0, help="rows to list that differ most, for each model")
    ] = 5,
    show_rows: Annotated[bool, typer.Option("--show-rows", help="list these rows with their text")] = False,
    home: flags.HomeFlag = None,
    config: flags.ConfigFlag = None,
    as_json: flags.JsonFlag = False,
) -> None:
    """Score models on the same rows, and compare each with the first: differences with paired 95 % intervals.

    A difference whose interval includes zero is called noise. A plug-in that is an adapter is put on the nearest model
    before it, and so is a return, behind its bundle. Settings are those of `offsite eval`. Text of the rows is printed
    only with --show-rows.

    Example:
      offsite compare base/ plugged/ other/ --data test.jsonl
    """
    from offsite.config import EvalSpec
    from offsite.errors import UsageError

    spec = flags.settings(EvalSpec, config, flag_values)
    if len(models) < 2:
        raise UsageError(
            f"there is nothing to compare {models[0]} with",
            next_step=f"name a second model: `offsite compare {shlex.quote(str(models[0]))} OTHER`",
        )
    if probe is not None and not verified_models.sees_images(models[0]):
        raise UsageError(
            f"{models[0]} is not an image model, so there is nothing to probe", next_step="leave --probe out"
        )
    named = verified_models.verify_models(models, flags.home_of(context, home))
    from offsite.evaluation.compare import Contestant
    from offsite.evaluation.compare import compare as compare_stage

    with terminal.showing_progress() as progress:
        found = compare_stage(
            [Contestant(one.name, one.model, one.adapter) for one in named],
            data,
            spec,
            probe=probe,
            listed=rows,
            with_text=show_rows,
            progress=progress,
        )
    if as_json:
        terminal.show({"kind": "comparison", "data": [str(path) for path in data], **_facts(found)}, as_json=True)
        return
    for line in _lines(found):
        typer.echo(one_line(line))
    if not show_rows and found.rows:
        terminal.hint("next: the same command with --show-rows, for the text of the rows that differ most")


def _facts(found: "Comparison") -> dict[str, Any]:
    """A comparison as values that JSON can hold."""
    facts = asdict(found)
    facts["against"] = found.models[0].name
    facts["rows"] = [{name: value for name, value in row.items() if value is not None} for row in facts["rows"]]
    return facts


def _lines(found: "Comparison") -> list[str]:
    """A comparison as lines of text: a table of the models, the differences, and the rows that differ most."""
    metrics = ["loss", *(name for name in _ACCURACIES if getattr(found.models[0], name) is not None)]
    table = [["", "rows", *(name.replace("_", " ") for name in metrics)]]
    for model in found.models:
        cells = []
        for metric in metrics:
            value, ends = getattr(model, metric), model.intervals.get(metric)
            cells.append(f"{value:.4g}" + (f"  [{ends.low:.4g}, {ends.high:.4g}]" if ends else ""))
        table.append([model.name, f"{model.rows:,}", *cells])
    lines = [*_aligned(table), "", f"against {found.models[0].name}:"]
    lines += _aligned([_difference_cells(one) for one in found.differences])
    if not found.same_tokens:
        lines.append("the tokenizers differ: differences of losses are per token of the first model")
    for name in dict.fromkeys(row.name for row in found.rows):
        rows = [row for row in found.rows if row.name == name]
        lines += ["", f"{name} differs most on:"]
        lines += [line for row in rows for line in _row_lines(row)]
    return lines


def _difference_cells(one: "Difference") -> list[str]:
    """The cells of a difference's line: model, metric, value, interval, verdict, and on how many rows it is better."""
    ends = f"[{one.interval.low:+.4g}, {one.interval.high:+.4g}]" if one.interval else ""
    counts = f"{one.better:,} rows better, {one.worse:,} worse, {one.equal:,} equal"
    return [one.name, one.metric.replace("_", " "), f"{one.value:+.4g}", ends, _MEANING[one.verdict], counts]


def _row_lines(row: "RowDifference") -> list[str]:
    """The lines of one row: its place, both losses, and its text if there is one."""
    place = f"{row.file}:{row.line}" if row.file else f"row {row.line}"
    lines = [f"  {place:<12}  loss {row.first_loss:.4g} -> {row.loss:.4g}  ({row.nats:+.4g} nats over the row)"]
    if row.text is not None:
        more = f" [... {len(row.text) - _MOST_LETTERS:,} letters]" if len(row.text) > _MOST_LETTERS else ""
        lines += [f"    | {line}" for line in f"{row.text[:_MOST_LETTERS]}{more}".splitlines()]
    return lines


def _aligned(table: list[list[str]]) -> list[str]:
    """The lines of a table, its columns aligned on the left."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
