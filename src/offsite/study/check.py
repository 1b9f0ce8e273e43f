"""Trying a recipe: every stage of its grid on a tiny random model and a few rows or pictures that are made up."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from offsite.config import PackSpec
from offsite.errors import UsageError
from offsite.extras import require
from offsite.models.architectures import ARCHITECTURES
from offsite.storage.safetensors_files import strict_json
from offsite.study.demos.tiny_base import tiny_base
from offsite.study.grid import cells_of
from offsite.study.prepare import prepare
from offsite.study.recipe import SMOLLM2, VIT_S14, DataTable, Recipe
from offsite.study.run import News, Runner, RunStage, Tell, run_cells, stages_of

_PUBLISHED = {SMOLLM2: ("llama", 30), VIT_S14: ("dinov2", 12)}
_TOKENS = 512  # of any setting that counts tokens
_ROWS = 8
_COLOURS = {"red": (220, 40, 40), "blue": (40, 40, 220)}


@dataclass(frozen=True)
class Tried:
    """What a check ran, and what of it failed."""

    cells: int
    stages: int
    failures: Sequence[str]
    missing: Sequence[str]  # files that the recipe names and that are not there


def check(recipe: Recipe, run: RunStage, tell: Tell) -> Tried:
    """Run the whole grid in small: two steps on a few rows, one data set of each kind, one seed.

    Args:
        recipe: from `load_recipe`; its base and files need not be there.
        run: runs a command.
        tell: told of every stage.

    Raises:
        UsageError: the recipe does not fit the base, or does not say which architecture it is for.
        IncompatibleError: there is no such architecture.
    """
    with tempfile.TemporaryDirectory(prefix="offsite-check-") as scratch:
        folder = Path(scratch)
        architecture, blocks = _kind(recipe)
        base = tiny_base(folder / "base", architecture, blocks, like=_there(recipe)).folder
        if ARCHITECTURES[architecture].vision is None:
            small = _small(recipe, _data(recipe, folder), None)
        else:
            pictures = _made_up_pictures(folder)
            small = _small(recipe, (pictures,), pictures.train)
        small = replace(small, base=base, missing=())
        lab, rows = prepare(small, folder / "study", lambda _: None)
        cells = cells_of(small, lab, rows)
        failures: list[str] = []

        def remember(news: News) -> None:
            if news.what == "failure":
                cell = cells[news.cell]
                failures.append(f"{cell.compressor.name}, {cell.method.name}, {news.row}: {news.says}")
            tell(news)

        total = len(stages_of(cells))
        run_cells(cells, Runner(lab, remember, total, run))
        return Tried(len(cells), total, failures, recipe.missing)


def _kind(recipe: Recipe) -> tuple[str, int | None]:
    """Architecture and number of blocks: the base's own, else what the recipe says."""
    if isinstance(recipe.base, str):
        return _PUBLISHED[recipe.base]
    there = _there(recipe)
    if there is not None:
        return str(strict_json((there / "config.json").read_bytes()).get("model_type")), None
    if recipe.architecture is None or recipe.blocks is None:
        raise UsageError(
            f"the base {recipe.base} is not there, and the recipe does not say what it is",
            next_step='add it to the recipe, e.g. architecture = "llama" and blocks = 30, or name it with --base',
        )
    return recipe.architecture, recipe.blocks


def _there(recipe: Recipe) -> Path | None:
    return recipe.base if isinstance(recipe.base, Path) and (recipe.base / "config.json").exists() else None


def _data(recipe: Recipe, folder: Path) -> tuple[DataTable, ...]:
    """A data set of made-up rows for each kind of score in the recipe."""
    kinds = dict.fromkeys(table.score for table in recipe.data)
    return tuple(_made_up(kind, folder) for kind in kinds)


def _made_up(score: Any, folder: Path) -> DataTable:
    files = []
    for part in ("train", "test"):
        rows: list[Mapping[str, Any]] = [
            {"question": f"{part} {i}?", "choices": ["yes", "no"], "answer": i % 2}
            if score != "loss"
            else {"prompt": f"{part} {i}:", "completion": " yes" * (1 + i % 3)}
            for i in range(_ROWS)
        ]
        files.append(folder / f"{score}.{part}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DataTable(name=f"made up, for {score}", train=files[0], test=files[1], score=score)


def _made_up_pictures(folder: Path) -> DataTable:
    """Plain pictures of two colours, which are its classes."""
    image = require("PIL.Image", "vision", "making pictures up")
    for part in ("train", "test"):
        for name, colour in _COLOURS.items():
            place = folder / "pictures" / part / name
            place.mkdir(parents=True)
            for i in range(_ROWS // 2):
                image.new("RGB", (20 + i, 20), tuple(max(0, level - 10 * i) for level in colour)).save(
                    place / f"{i}.png"
                )
    return DataTable(name="made up", train=folder / "pictures" / "train", test=folder / "pictures" / "test")


def _small(recipe: Recipe, data: tuple[DataTable, ...], own: Path | None) -> Recipe:
    tuning = {"max_steps": 2, "batch_size": 4, "eval_every": None, "micro_batch_tokens": _TOKENS}
    fits = {"max_length": 256, "long_rows": "error"}
    return replace(
        recipe,
        data=data,
        seeds=recipe.seeds[:1],
        compressors=tuple(replace(one, spec=_quick(one.spec, own)) for one in recipe.compressors),
        methods=tuple(
            replace(one, spec=one.spec.changed(tuning | fits), full=one.full.changed(tuning | fits))
            for one in recipe.methods
        ),
        eval=recipe.eval.changed(fits | {"micro_batch_tokens": _TOKENS}),
    )


def _quick(spec: PackSpec, own: Path | None) -> PackSpec:
    """Whatever a setting counts, steps or tokens, is few; what the owner would have of its own is `own` or nothing."""
    few: dict[str, Any] = {}
    for key, setting in spec.settings().items():
        kind = setting.field.annotation
        if kind is int or int in get_args(kind):
            few |= {key: 2} if key.endswith("steps") else {key: _TOKENS} if key.endswith("tokens") else {}
        elif isinstance(setting.of(spec), Path):
            few[key] = own
    return spec.changed(few)
