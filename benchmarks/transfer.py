"""What predicts how well an adapter transfers: measured over the bundles of a study that has been run.

    offsite study recipes/small/aims.toml --data-root ../shared/data --out runs/aims
    python -m benchmarks.transfer recipes/small/aims.toml runs/aims ../shared/data/sciq/train.jsonl

For each bundle it computes two numbers that the model owner can know before anything is sent, on rows of its own: the
cosine between the gradients of emulator and base, and the emulator's loss. For each data set of the study it prints the
rank correlation (Spearman) of each number with the gain recovered, and with the emulator's own gain.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.work import versions

from offsite.data.examples import Example
from offsite.data.read_rows import read_rows
from offsite.data.tokens import encode
from offsite.model_owner.base_model import BaseModel, open_base
from offsite.model_owner.gradient_agreement import gradient_agreement
from offsite.model_owner.ledger import Ledger
from offsite.models.tokenizers import load_tokenizer
from offsite.protocol.artifacts import Base
from offsite.protocol.home import Home
from offsite.protocol.verify import verify_bundle
from offsite.study.grid import GridPoint, expand_grid
from offsite.study.prepare_study import prepare
from offsite.study.recipe import load_recipe
from offsite.study.report.results import GridPointResult, collect
from offsite.study.resumable_chain import OWNER, TUNER

RESULT = Path(__file__).parent / "results" / "transfer.json"
PREDICTORS = ("cosine", "emulator_loss")
OUTCOMES = ("gain_recovered", "own_gain")


def main() -> None:
    """Compute, print the tables, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="the study's recipe")
    parser.add_argument("study", type=Path, help="the folder of the finished study")
    parser.add_argument("rows", type=Path, help="rows of the model owner, which the study does not tune on")
    parser.add_argument("--data-root", type=Path, help="as for `offsite study`")
    parser.add_argument("--count", type=int, default=64, help="rows to use")
    parser.add_argument("--result", type=Path, default=RESULT)
    wanted = parser.parse_args()
    recipe = load_recipe(wanted.recipe, data_root=wanted.data_root)
    workspace, rows = prepare(recipe, wanted.study, print)
    points = expand_grid(recipe, workspace, rows)
    model = open_base(Base(workspace.base))
    examples = examples_of(model, wanted.rows, wanted.count)
    of_bundles = {point.compressor.name: point for point in points}
    bundles = {name: _predictors(model, wanted.study, point, examples) for name, point in of_bundles.items()}
    cells = [_outcomes(cell) for cell in collect(recipe, points, wanted.study).cells]
    result = {"versions": versions(), "rows": wanted.rows.parent.name, "bundles": bundles, "cells": cells}
    wanted.result.write_text(json.dumps(result, indent=1) + "\n")
    print(tables(result))


def examples_of(model: BaseModel, rows: Path, count: int) -> list[Example]:
    """The first rows of a file, encoded for the base; long ones are cut."""
    found = read_rows(rows)[:count]
    encoded = encode(found, load_tokenizer(model.folder), source=rows, max_length=384, long_rows="truncate")
    return list(encoded.examples)


def _predictors(model: BaseModel, study: Path, point: GridPoint, examples: Sequence[Example]) -> dict[str, float]:
    """What the owner can know of a bundle before it is sent."""
    bundle = verify_bundle(point.pack.out, Home(study / TUNER / "home"))
    issued = Ledger(Home(study / OWNER / "home").ledger).issued(bundle.digest)
    if issued is None or issued.carry is None:
        raise SystemExit(f"the ledger of {study} does not hold the bundle {point.pack.out}")
    found = gradient_agreement(model, bundle, issued.carry, examples, torch.device("cpu"))
    print(f"{point.compressor.name}: cosine {found.cosine:.3f}, loss {found.losses[1]:.3f}", flush=True)
    return {"cosine": found.cosine, "base_loss": found.losses[0], "emulator_loss": found.losses[1]}


def _outcomes(cell: GridPointResult) -> dict[str, Any]:
    figures = {name: getattr(cell, name) for name in OUTCOMES}
    values = {name: None if figure is None else figure.value for name, figure in figures.items()}
    return {"dataset": cell.dataset, "compress": cell.compress, "seed": cell.seed, **values}


def tables(result: Mapping[str, Any]) -> str:
    """The table of all bundles, and that of the correlations, in Markdown."""
    cells, bundles = result["cells"], result["bundles"]
    sets = list(dict.fromkeys(cell["dataset"] for cell in cells))
    lines = ["| bundle | cosine | emulator's loss |" + "".join(f" {one}: recovered, own gain, % |" for one in sets)]
    lines.append("|---|---:|---:|" + "---:|" * len(sets))
    for name, known in bundles.items():
        shown = [" ".join(_percents(cell) for cell in _cells(cells, one, name)) for one in sets]
        lines.append(f"| {name} | {known['cosine']:.3f} | {known['emulator_loss']:.3f} | {' | '.join(shown)} |")
    lines += ["", "| rank correlation | with | " + " | ".join(sets) + " |", "|---|---|" + "---:|" * len(sets)]
    for predictor in PREDICTORS:
        for outcome in OUTCOMES:
            found = [f"{correlation(result, one, predictor, outcome):.2f}" for one in sets]
            lines.append(f"| {predictor} | {outcome} | {' | '.join(found)} |")
    return "\n".join(lines)


def correlation(result: Mapping[str, Any], dataset: str, predictor: str, outcome: str) -> float:
    """Spearman's rank correlation over the cells of a data set; nan for fewer than three."""
    pairs = [
        (result["bundles"][cell["compress"]][predictor], cell[outcome])
        for cell in result["cells"]
        if cell["dataset"] == dataset and cell[outcome] is not None
    ]
    if len(pairs) < 3:
        return float("nan")
    ranks = [np.argsort(np.argsort(column)) for column in zip(*pairs, strict=True)]
    return float(np.corrcoef(*ranks)[0, 1])


def _cells(cells: Sequence[Mapping[str, Any]], dataset: str, name: str) -> list[Mapping[str, Any]]:
    return [cell for cell in cells if cell["dataset"] == dataset and cell["compress"] == name]


def _percents(cell: Mapping[str, Any]) -> str:
    return ", ".join("-" if cell[name] is None else f"{100 * cell[name]:.0f}" for name in OUTCOMES)


if __name__ == "__main__":
    main()
