"""The command eval, which scores a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from offsite.cli import flags, terminal, verified_models
from offsite.cli.setting_flags import FlagValues

if TYPE_CHECKING:
    from offsite.config import EvalSpec

_ROW_BY_ROW = ("row_losses", "choice_scores", "pictures")  # fields with a value for each row, left out of the summary


def eval_(
    context: typer.Context,
    flag_values: FlagValues,
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="checkpoint folder: a base, a bundle, a merged plug-in")
    ],
    data: Annotated[list[Path] | None, flags.DATA_OPTION] = None,
    adapter: Annotated[Path | None, typer.Option(metavar="FOLDER", help="PEFT adapter: a return or a plug-in")] = None,
    probe: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="pictures to fit a linear probe on an encoder without a head")
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", min=0, help="also generate answers to the first N prompts")] = 0,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAMES", help="tasks of lm-evaluation-harness, with commas between them")
    ] = None,
    tasks_path: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="task files of your own, for --tasks")
    ] = None,
    row_scores: Annotated[
        Path | None, typer.Option(metavar="FILE", help="also write the score of every row or picture as JSON lines")
    ] = None,
    check: flags.CheckFlag = False,
    home: flags.HomeFlag = None,
    config: flags.ConfigFlag = None,
    as_json: flags.JsonFlag = False,
) -> None:
    """Score a model on rows: loss per labelled token, perplexity, and accuracy where rows are multiple choice.

    Prompts are not scored. Figures come with 95 % confidence intervals over rows. With --tasks, the model is scored by
    lm-evaluation-harness, on its tasks or on yours (extra 'lm-eval'). An image model is scored by accuracy and loss on
    pictures. Bundles, returns and plug-ins are verified first, and an adapter must be for the model.

    Example:
      offsite eval base/ --adapter plugged/ --data test.jsonl
    """
    from offsite.config import EvalSpec
    from offsite.errors import UsageError

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    data = data or None
    if data is None and not names:
        raise UsageError("there is nothing to score on", next_step="give rows with --data, or tasks with --tasks")
    spec = flags.settings(EvalSpec, config, flag_values)
    _require_used(data, names, {"--samples": samples, "--row-scores": row_scores}, tasks_path)
    _require_fitting(model, names, samples, probe, skip_bad=bool(flag_values["skip_bad"]))
    if row_scores is not None and data is not None:
        _require_writable(row_scores, data)
    scored, tuned = verified_models.verify_model(model, adapter, flags.home_of(context, home), hold=not check)
    if check:
        from offsite.evaluation.lineage import require_lineage

        require_lineage(scored, tuned)
        _check(model, data, spec, as_json=as_json)
    result: dict[str, Any] = {"model": str(model), "adapter": str(adapter) if adapter else None}
    with terminal.showing_progress() as progress:
        if names:  # first, since an unknown task gives an error at once
            from offsite.evaluation.lm_eval_harness import run_tasks

            scores = run_tasks(scored, names, spec, adapter=tuned, tasks_path=tasks_path, progress=progress)
            result["tasks"] = {score.task: {"rows": score.rows, **score.metrics} for score in scores}
        if data is not None:
            from dataclasses import asdict

            if verified_models.sees_images(model):
                from offsite.evaluation.image_scores import evaluate_images
                from offsite.evaluation.row_scores import write_picture_scores

                seen = evaluate_images(scored, data, spec, adapter=tuned, probe=probe, progress=progress)
                if row_scores is not None:
                    write_picture_scores(row_scores, seen)
                figures = asdict(seen)
            else:
                from offsite.evaluation.evaluate import evaluate
                from offsite.evaluation.row_scores import write_row_scores

                score = evaluate(scored, data, spec, adapter=tuned, samples=samples, progress=progress)
                if row_scores is not None:
                    write_row_scores(row_scores, score)
                figures = asdict(score)
            result |= {name: value for name, value in figures.items() if name not in _ROW_BY_ROW}
    terminal.show(result if as_json else with_intervals(result), as_json=as_json)
    both = (model, adapter) if adapter else (model, "OTHER")
    terminal.hint_command("compare", *both, "--data", data[0] if data else "test.jsonl")


def _check(model: Path, data: list[Path] | None, spec: "EvalSpec", *, as_json: bool) -> NoReturn:
    """Run `eval --check`: read the data as an evaluation would, print a description, and exit."""
    from offsite.cli.show_check import show_checks
    from offsite.errors import UsageError
    from offsite.evaluation.check_eval_data import check_eval_data

    if data is None:
        raise UsageError("--check is about rows", next_step="give rows with --data")
    raise typer.Exit(show_checks({"data": check_eval_data(model, data, spec)}, as_json=as_json))


def _require_used(
    data: list[Path] | None, tasks: Sequence[str], of_rows: Mapping[str, object], tasks_path: Path | None
) -> None:
    """Check that no flag is given that would have no effect.

    Args:
        data: the values of --data; None: left out.
        tasks: the names in --tasks.
        of_rows: the flags that need --data, with their values.
        tasks_path: the value of --tasks-path, which needs --tasks.

    Raises:
        UsageError: a flag needs --data or --tasks, which was left out.
    """
    from offsite.errors import UsageError

    unused = [name for name, value in of_rows.items() if value] if data is None else []
    if unused:
        raise UsageError(f"{' and '.join(unused)} are about rows", next_step="give rows with --data")
    if tasks_path is not None and not tasks:
        raise UsageError("--tasks-path is about tasks", next_step="name tasks with --tasks, or leave it out")


def _require_writable(file: Path, data: Sequence[Path]) -> None:
    """Check the file of --row-scores before any work: it must not be a folder or one of the data files.

    Raises:
        UsageError: the file is a folder, is one of `data`, or is inside a model, an artifact or the data.
    """
    from offsite.errors import UsageError
    from offsite.protocol.output_place import require_outside

    if file.is_dir():
        raise UsageError(f"{file} is a folder", next_step="name a file with --row-scores")
    if file.resolve() in [path.resolve() for path in data]:
        raise UsageError(f"{file} holds the rows themselves", next_step="name another file with --row-scores")
    require_outside(file, data, flag="--row-scores")


def _require_fitting(model: Path, tasks: Sequence[str], samples: int, probe: Path | None, *, skip_bad: bool) -> None:
    """Check that the flags are for the kind of the model, which is a language model or an image model.

    The arguments after `model` are the values of the flags; an empty list, 0, None and False mean left out.

    Raises:
        UsageError: --probe or --skip-bad for a language model, or --tasks or --samples for an image model.
    """
    from offsite.errors import UsageError

    images = verified_models.sees_images(model)
    if images and (tasks or samples):
        raise UsageError(f"{model} sees images and writes nothing", next_step="leave --tasks and --samples out")
    if probe is not None and not images:
        raise UsageError(f"{model} is not an image model, so there is nothing to probe", next_step="leave --probe out")
    if skip_bad and not images:
        raise UsageError(f"{model} is not an image model, so no picture is bad", next_step="leave --skip-bad out")


def with_intervals(result: Mapping[str, Any]) -> dict[str, Any]:
    """The result for printing: a figure that has a confidence interval becomes text with the interval after it."""
    intervals = result.get("intervals", {})
    shown = {name: value for name, value in result.items() if name != "intervals"}
    for name, ends in intervals.items():
        shown[name] = f"{result[name]:.4g}  [{ends['low']:.4g}, {ends['high']:.4g}]"
    return shown
