"""Checks a recipe: runs every stage of its grid on a tiny random model and a few synthetic rows or pictures."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from offsite.config import PackSpec
from offsite.errors import UsageError
from offsite.extras import require
from offsite.models.families.architectures import ARCHITECTURES
from offsite.storage.strict_json import strict_json
from offsite.study.demos.tiny_base import tiny_base
from offsite.study.grid import expand_grid
from offsite.study.prepare_study import prepare
from offsite.study.recipe import SMOLLM2, VIT_S14, DataTable, Recipe
from offsite.study.run_grid import OnStudyEvent, Runner, RunStage, StudyEvent, list_stages, run_grid

_PUBLISHED = {SMOLLM2: ("llama", 30), VIT_S14: ("dinov2", 12)}
_TOKENS = 512  # the value of every setting that is a number of tokens
_ROWS = 8
_COLOURS = {"red": (220, 40, 40), "blue": (40, 40, 220)}


@dataclass(frozen=True)
class CheckResult:
    """The result of `check`: how many grid points and stages it ran, and a message for each failure."""

    points: int
    stages: int
    failures: Sequence[str]
    missing: Sequence[str]  # files that the recipe names and that do not exist


def check(recipe: Recipe, run: RunStage, on_event: OnStudyEvent) -> CheckResult:
    """Run the grid of a recipe at a small size: two steps on a few rows, one data set of each kind, one seed.

    Args:
        recipe: from `load_recipe`; its base and files need not exist.
        run: runs one `offsite` command.
        on_event: called with every event of the run.

    Raises:
        UsageError: the recipe does not fit the base, or names no architecture and the base does not exist.
        IncompatibleError: the architecture is unknown.
    """
    with tempfile.TemporaryDirectory(prefix="offsite-check-") as scratch:
        folder = Path(scratch)
        architecture, blocks = _architecture_and_blocks(recipe)
        base = tiny_base(folder / "base", architecture, blocks, like=_base_folder(recipe)).folder
        if ARCHITECTURES[architecture].vision is None:
            small = _shrink_recipe(recipe, _data(recipe, folder), None)
        else:
            pictures = _synthetic_pictures(folder)
            small = _shrink_recipe(recipe, (pictures,), pictures.train)
        small = replace(small, base=base, missing=())
        workspace, rows = prepare(small, folder / "study", lambda _: None)
        points = expand_grid(small, workspace, rows)
        failures: list[str] = []

        def remember(event: StudyEvent) -> None:
            if event.kind == "failure":
                point = points[event.point]
                failures.append(f"{point.compressor.name}, {point.method.name}, {event.row}: {event.description}")
            on_event(event)

        total = len(list_stages(points))
        run_grid(points, Runner(workspace, remember, total, run))
        return CheckResult(len(points), total, failures, recipe.missing)


def _architecture_and_blocks(recipe: Recipe) -> tuple[str, int | None]:
    """The architecture and number of blocks for the tiny model; None means as many blocks as the base folder has."""
    if isinstance(recipe.base, str):
        return _PUBLISHED[recipe.base]
    folder = _base_folder(recipe)
    if folder is not None:
        return str(strict_json((folder / "config.json").read_bytes()).get("model_type")), None
    if recipe.architecture is None or recipe.blocks is None:
        raise UsageError(
            f"the base {recipe.base} does not exist, and the recipe does not state its architecture and blocks",
            next_step='add it to the recipe, e.g. architecture = "llama" and blocks = 30, or name it with --base',
        )
    return recipe.architecture, recipe.blocks


def _base_folder(recipe: Recipe) -> Path | None:
    """The recipe's base folder; None if it does not exist or the base is a pretrained model."""
    return recipe.base if isinstance(recipe.base, Path) and (recipe.base / "config.json").exists() else None


def _data(recipe: Recipe, folder: Path) -> tuple[DataTable, ...]:
    """Write one synthetic data set of text for each kind of score in the recipe."""
    kinds = dict.fromkeys(table.score for table in recipe.data)
    return tuple(_synthetic_rows(kind, folder) for kind in kinds)


def _synthetic_rows(score: Any, folder: Path) -> DataTable:
    """Write a few synthetic rows for training and testing, of a kind that has this score."""
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


def _synthetic_pictures(folder: Path) -> DataTable:
    """Write a data set of pictures of a single colour; the two colours are the classes."""
    image = require("PIL.Image", "vision", "writing synthetic pictures")
    for part in ("train", "test"):
        for name, colour in _COLOURS.items():
            place = folder / "pictures" / part / name
            place.mkdir(parents=True)
            for i in range(_ROWS // 2):
                image.new("RGB", (20 + i, 20), tuple(max(0, level - 10 * i) for level in colour)).save(
                    place / f"{i}.png"
                )
    return DataTable(name="made up", train=folder / "pictures" / "train", test=folder / "pictures" / "test")


def _shrink_recipe(recipe: Recipe, data: tuple[DataTable, ...], pictures: Path | None) -> Recipe:
    """A copy of a recipe with one seed, the data sets `data`, and settings for runs of two steps.

    `pictures` replaces the model owner's calibration files; None means the default calibration data.
    """
    tuning = {"max_steps": 2, "batch_size": 4, "eval_every": None, "micro_batch_tokens": _TOKENS}
    fits = {"max_length": 256, "long_rows": "error"}
    return replace(
        recipe,
        data=data,
        seeds=recipe.seeds[:1],
        compressors=tuple(replace(one, spec=_shrink_pack_spec(one.spec, pictures)) for one in recipe.compressors),
        methods=tuple(
            replace(one, spec=one.spec.changed(tuning | fits), full=one.full.changed(tuning | fits))
            for one in recipe.methods
        ),
        eval=recipe.eval.changed(fits | {"micro_batch_tokens": _TOKENS}),
    )


def _shrink_pack_spec(spec: PackSpec, pictures: Path | None) -> PackSpec:
    """Replace numbers of steps and tokens by small ones, and the owner's calibration files by `pictures`.

    None means the default calibration data.
    """
    small: dict[str, Any] = {}
    for key, setting in spec.settings().items():
        kind = setting.field.annotation
        if kind is int or int in get_args(kind):
            small |= {key: 2} if key.endswith("steps") else {key: _TOKENS} if key.endswith("tokens") else {}
        elif isinstance(setting.of(spec), Path):
            small[key] = pictures
    return spec.changed(small)
