"""A tiny study: a base, two data sets and a recipe, run without a process for each stage."""

import json
from dataclasses import dataclass
from pathlib import Path

from offsite.cli.study import run_in_this_process
from offsite.study.grid import GridPoint, expand_grid
from offsite.study.prepare_study import prepare
from offsite.study.recipe import Recipe, load_recipe
from offsite.study.report.results import Results, collect
from offsite.study.run_command import Outcome, Words
from offsite.study.run_grid import Runner, StudyEvent, list_stages, run_grid
from tiny import tiny_base, tiny_rows

RECIPE = """
title = "A tiny study"
base = "base"

[shared]
max_length = 64
max_steps = 3
batch_size = 4
compute = "fp32"

[[data]]
name = "prompts"
train = "train.jsonl"
test = "test.jsonl"
max_test_rows = 6

[[data]]
name = "choices"
train = "choices.jsonl"
test = "choices.jsonl"
score = "accuracy"

[[pack]]
name = "drop"
bottom = 1
top = 1
keep = 2
heal = "none"

[[tune]]
name = "LoRA"
method = "lora"
rank = 2

[full]
lr = 1e-3
"""


def lay_out(folder: Path, recipe: str = RECIPE) -> Path:
    """Base, rows and recipe in a folder; returns the recipe."""
    if not (folder / "base").exists():
        tiny_base(folder / "base", blocks=6)
    tiny_rows(folder / "train.jsonl", 12)
    tiny_rows(folder / "test.jsonl", 9)
    asked = [{"question": f"Is it {i}?", "choices": ["yes", "no"], "answer": i % 2} for i in range(8)]
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    file = folder / "recipe.toml"
    file.write_text(recipe)
    return file


class Played:
    """A run of a study, and what it did."""

    def __init__(self, recipe: Path, out: Path) -> None:
        self.recipe: Recipe = load_recipe(recipe)
        self.workspace, rows = prepare(self.recipe, out, lambda _: None)
        self.points: list[GridPoint] = expand_grid(self.recipe, self.workspace, rows)
        self.ran: list[str] = []
        self.events: list[StudyEvent] = []
        self.stages = list_stages(self.points)

    def run(self, words: Words, log: Path) -> Outcome:
        """A stage, and a note of it."""
        verbs = {"pack", "verify", "tune", "plug-in", "eval", "full-fine-tuning"}
        self.ran.append(next(str(word) for word in words if str(word) in verbs))
        return run_in_this_process(words, log)

    def go(self) -> int:
        """Run what is not there yet; returns how many cells failed."""
        runner = Runner(self.workspace, self.events.append, len(self.stages), self.run)
        return run_grid(self.points, runner, keep_models=self.recipe.keep_models)


@dataclass(frozen=True)
class Study:
    """A study that was played to its end without a failure, and what it found."""

    folder: Path
    played: Played
    results: Results


def played_study(recipe: Path) -> Study:
    """Play a recipe that was laid out; what it makes goes to `out` beside it."""
    played = Played(recipe, recipe.parent / "out")
    assert played.go() == 0
    return Study(recipe.parent, played, collect(played.recipe, played.points, recipe.parent / "out"))
