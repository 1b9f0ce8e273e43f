from pathlib import Path
from typing import Any

import pytest

from offsite.errors import UsageError
from offsite.study.recipe import ROWS, load_recipe, require_files
from offsite.study.report.results import _placement
from offsite.study.stages import uncompressed_spec
from studies import RECIPE, lay_out


def problems(tmp_path: Path, old: str, new: str) -> list[str]:
    assert old in RECIPE
    with pytest.raises(UsageError) as caught:
        load_recipe(lay_out(tmp_path, RECIPE.replace(old, new)))
    assert "Nothing was run" in str(caught.value.next_step)
    return list(caught.value.reasons)


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "No such file"), ("folder", "Is a directory"), (b"[[pack", "not TOML"), (b"\xff", "not TOML")],
)
def test_what_is_no_recipe_is_told_with_a_next_step(tmp_path: Path, content: bytes | str | None, says: str) -> None:
    file = tmp_path / "recipe.toml"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content:
        file.mkdir()
    with pytest.raises(UsageError, match=says) as caught:
        load_recipe(file)
    assert "docs/study.md" in (caught.value.next_step or "")


def test_a_recipe_is_resolved_by_the_specs_of_the_stages(tmp_path: Path) -> None:
    recipe = load_recipe(lay_out(tmp_path))
    assert recipe.rows == ROWS
    assert recipe.grid_size == 2
    assert recipe.base == tmp_path / "base"
    assert recipe.data[0].train == tmp_path / "train.jsonl"
    (pack,), (tune,) = recipe.compressors, recipe.methods
    assert (pack.spec.select.keep, pack.spec.heal.steps, pack.spec.runtime.compute) == (2, (), "fp32")
    assert (tune.spec.adapter.rank, tune.spec.length.max_steps, tune.spec.peak_lr) == (2, 3, 1e-3)
    assert (tune.full.adapter.method, tune.full.optimizer.lr, tune.full.length.max_steps) == ("full", 1e-3, 3)
    assert (recipe.eval.max_length, recipe.eval.runtime.compute) == (64, "fp32")
    assert recipe.missing == ()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("keep = 2", "kep = 2", "[[pack]] 'drop'.kep: there is no such setting; did you mean 'keep'?"),
        ("keep = 2", "keep = 0", "[[pack]] 'drop'.keep: Input should be greater than or equal to 1 (found 0)"),
        ('heal = "none"', 'heal = "refit,refit"', "heal names a step twice"),
        ("rank = 2", "lr = 0", "[[tune]] 'LoRA'.lr: Input should be greater than 0 (found 0)"),
        ("rank = 2", "seed = 4", "[[tune]] 'LoRA'.seed: cells have the seeds of the list `seeds`, e.g. seeds = [4]"),
        ("rank = 2", 'rank = 2\n[[tune]]\nname = "LoRA"', "[[tune]]: 'LoRA' is there more than once"),
        ("[full]", "[full]\nrnk = 3", "[full].rnk: there is no such setting; did you mean 'rank'?"),
        ("max_length = 64", "max_len = 64", "[shared].max_len: there is no such setting; did you mean 'max_length'?"),
        ('base = "base"', 'base = "base"\nrows = ["plugin"]', "rows.0: Input should be 'zero_shot'"),
        ('base = "base"', 'base = "base"\ngrid = 1', "grid: there is no such setting; expected one of"),
        ('base = "base"', 'base = "base"\nseeds = [1, 1]', "seeds: '1' is there more than once"),
        ('name = "drop"', "", "[[pack]] number 1.name: found None, expected a short text"),
        ('name = "choices"', 'name = "prompts"', "[[data]]: 'prompts' is there more than once"),
        (
            "keep = 2",
            'keep = 2\nmethods = ["full"]',
            "[[tune]] 'LoRA'.method: [[pack]] 'drop' permits full; put 'lora'",
        ),
        ("rank = 2", "rank = 65", "[[tune]] 'LoRA'.rank: [[pack]] 'drop' permits up to 64; change its `max_rank`"),
        ("[[pack]]", '[[placement]]\nname = "one"\nkeep = 3\n[[pack]]', "keep: given in both tables"),
    ],
)
def test_every_problem_names_its_field_and_what_would_work(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert any(said in problem for problem in problems(tmp_path, old, new))


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    found = problems(tmp_path, "keep = 2", "keep = 0\nbottum = 1")
    assert len(found) == 2


def test_a_default_is_named_where_a_value_is_wrong(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, "keep = 2", "keep = 2\ncalibration_tokens = 1")
    assert "tokens to select and solve with" in found
    assert "the default is 65536" in found


def test_the_example_in_the_documents_is_a_recipe(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "study.md").read_text()
    (tmp_path / "recipe.toml").write_text(text.split("```toml\n")[1].split("```")[0])
    recipe = load_recipe(tmp_path / "recipe.toml")
    assert (recipe.base, recipe.seeds, recipe.methods[0].full.optimizer.lr) == ("smollm2", (0, 1), 1e-4)
    assert recipe.compressors[0].placement == "ends"


def test_a_data_set_may_have_settings_of_its_own(tmp_path: Path) -> None:
    text = RECIPE.replace("[[pack]]", "[data.tune]\nepochs = 7\nlr = 2e-3\n\n[[pack]]", 1)
    recipe = load_recipe(lay_out(tmp_path, text))
    (method,) = recipe.methods
    plain, own = (method.on(table) for table in recipe.data)
    assert (plain.spec, plain.full) == (method.spec, method.full)
    assert (own.spec.length.epochs, own.spec.optimizer.lr, own.full.length.epochs, own.full.optimizer.lr) == (
        7,
        2e-3,
        7,
        2e-3,
    )
    assert (own.spec.adapter.rank, own.full.adapter.method) == (method.spec.adapter.rank, "full")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("epoch = 7", "[[data]] 'choices'.tune.epoch: there is no such setting; did you mean 'epochs'?"),
        ("epochs = 0", "[[data]] 'choices'.tune.epochs: Input should be greater than 0 (found 0)"),
        ("rank = 4", "[[data]] 'choices'.tune.rank: is the same for all data sets; say it in [[tune]]"),
        ("seed = 4", "[[data]] 'choices'.tune.seed: is the same for all data sets"),
    ],
)
def test_what_a_data_set_may_not_have_of_its_own(tmp_path: Path, setting: str, said: str) -> None:
    (found,) = problems(tmp_path, "[[pack]]", f"[data.tune]\n{setting}\n\n[[pack]]")
    assert said in found


def test_placements_multiply_with_compressors(tmp_path: Path) -> None:
    text = RECIPE.replace("bottom = 1\ntop = 1\n", "")
    text += '[[placement]]\nname = "ends"\nbottom = 1\ntop = 1\n[[placement]]\nname = "top"\nbottom = 0\ntop = 2\n'
    recipe = load_recipe(lay_out(tmp_path, text))
    assert [(one.name, one.placement, one.spec.split.bottom, one.spec.select.keep) for one in recipe.compressors] == [
        ("drop", "ends", 1, 2),
        ("drop", "top", 0, 2),
    ]


def test_a_placement_may_list_blocks(tmp_path: Path) -> None:
    text = RECIPE.replace("bottom = 1\ntop = 1\n", "") + '[[placement]]\nname = "spread"\ntrain = [0, 2, 4]\n'
    (compressor,) = load_recipe(lay_out(tmp_path, text)).compressors
    assert compressor.spec.split.train == (0, 2, 4)
    assert uncompressed_spec(compressor.spec, 2).split.train == (0, 2, 4)


@pytest.mark.parametrize(
    ("split", "shown"),
    [
        ({"bottom": 2, "emulator": 8, "top": 2}, "2-8-2"),
        ({"bottom": 0, "emulator": 5, "top": 1, "spread": [1, 2]}, "0-1-(2)-2-1"),
    ],
)
def test_how_a_placement_is_written(split: dict[str, Any], shown: str) -> None:
    assert _placement(split) == shown


def test_files_are_looked_for_in_the_data_root_first(tmp_path: Path) -> None:
    file = lay_out(tmp_path)
    root = tmp_path / "root"
    root.mkdir()
    (root / "train.jsonl").write_text("x")
    recipe = load_recipe(file, data_root=root, base=tmp_path / "other")
    assert recipe.data[0].train == root / "train.jsonl"
    assert recipe.data[0].test == tmp_path / "test.jsonl"
    assert recipe.base == tmp_path / "other"


def test_what_is_not_there_is_listed_before_anything_runs(tmp_path: Path) -> None:
    file = lay_out(tmp_path, RECIPE.replace("keep = 2", 'keep = 2\ncalibration = "text.txt"'))
    (tmp_path / "train.jsonl").unlink()
    recipe = load_recipe(file)
    with pytest.raises(UsageError) as caught:
        require_files(recipe)
    assert [reason.split(":")[0] for reason in caught.value.reasons] == [
        "[[data]] 'prompts'.train",
        "[[pack]] 'drop'.calibration",
    ]
