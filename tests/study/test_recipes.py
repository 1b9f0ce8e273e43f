"""Every recipe of the repository: all of its settings are checked, and its grid is tried in small.

To stay fast the grid runs for its first and last compressor and up to the last row, and that of some of the paper's
tables and figures only with --every-form; `offsite study RECIPE --check` runs all of it.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from offsite.cli.study import run_in_this_process
from offsite.study.check_recipe import check
from offsite.study.demos.tiny_base import tiny_base
from offsite.study.prepare_study import require_recipe_fits_base
from offsite.study.recipe import load_recipe
from tiny import timm_imports

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*/*.toml"))
# Grids on another base than one that runs, or of compressors and placements that one that runs has too.
ALIKE = {"figure3", "figure4-layer-drop", "figure4-quantisation", "table1-gpt2-xl", "table2-bloom-7.1b"}
ALIKE |= {"table2-opt-6.7b", "table3-eva", "table5-gpt2-xl", "table5-opt-1.3b", "figure4-pruning"}
ALIKE |= {"gemma3", "pruners", "frontier", "methods", "placement", "spread", "top"}


def name(file: Path) -> str:
    return f"{file.parent.name}/{file.stem}"


each = pytest.mark.parametrize("file", RECIPES, ids=name)


def skip_without_timm(file: Path) -> None:
    if load_recipe(file).architecture == "timm_wrapper" and not timm_imports():
        pytest.skip("timm cannot be imported here")


def test_they_are_all_found() -> None:
    assert len(RECIPES) >= 15
    assert {file.stem for file in RECIPES} >= ALIKE


@each
def test_every_compressor_fits_the_base(file: Path, tmp_path: Path) -> None:
    skip_without_timm(file)
    recipe = load_recipe(file)
    base = tiny_base(tmp_path / "base", recipe.architecture or "llama", recipe.blocks or 30)
    require_recipe_fits_base(recipe, base.folder)


@pytest.mark.parametrize(
    "file", [pytest.param(file, marks=[pytest.mark.every_form] * (file.stem in ALIKE)) for file in RECIPES], ids=name
)
def test_the_grid_runs_in_small(file: Path) -> None:
    skip_without_timm(file)
    recipe = load_recipe(file)
    some = tuple(dict.fromkeys((recipe.compressors[0], recipe.compressors[-1])))
    tried = check(replace(recipe, compressors=some, rows=recipe.rows[-1:]), run_in_this_process, lambda _: None)
    assert tried.failures == []
    assert tried.points == len(some) * len(recipe.methods) * len({one.score for one in recipe.data})


@pytest.mark.every_form
def test_every_compressor_of_the_comparison_makes_a_bundle() -> None:
    recipe = load_recipe(next(file for file in RECIPES if file.stem == "compressors"))
    tried = check(replace(recipe, rows=("emulator_zero_shot",)), run_in_this_process, lambda _: None)
    assert tried.failures == []
    assert tried.points == len(recipe.compressors) == 15


@each
def test_a_reader_finds_it(file: Path) -> None:
    assert file.name in (file.parents[1] / "README.md").read_text()
