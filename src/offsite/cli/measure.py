"""Scoring a model: eval."""

from pathlib import Path
from typing import Annotated

import typer

from offsite.cli import flags, terminal


def eval_(
    context: typer.Context,
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="checkpoint folder: a base, a bundle, a merged plug-in")
    ],
    data: Annotated[Path, typer.Option(metavar="FILE", help="JSONL with rows {prompt, completion} or {text}")],
    adapter: Annotated[Path | None, typer.Option(metavar="FOLDER", help="PEFT adapter: a return or a plug-in")] = None,
    samples: Annotated[int, typer.Option(metavar="N", min=0, help="also generate answers to the first N prompts")] = 0,
    config: flags.ConfigFlag = None,
    as_json: flags.JsonFlag = False,
) -> None:
    """Score a model on rows: loss in nats per labelled token, and perplexity. Prompts are not scored.

    Example:
      offsite eval base/ --adapter plugged/ --data test.jsonl
    """
    from dataclasses import asdict

    from offsite.config import EvalSpec

    spec = flags.settings(EvalSpec, config, {})
    from offsite.measure.evaluate import evaluate

    with terminal.showing_progress() as progress:
        score = evaluate(model, data, spec, adapter=adapter, samples=samples, progress=progress)
    summary = {name: value for name, value in asdict(score).items() if name != "row_losses"}
    terminal.show({"model": str(model), "adapter": str(adapter) if adapter else None} | summary, as_json=as_json)
