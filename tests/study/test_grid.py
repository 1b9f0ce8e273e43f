"""What a stage's key holds, and which settings the bound of a cell keeps."""

import shutil
from pathlib import Path

import pytest

from offsite.config import PackSpec
from offsite.study.grid import expand_grid
from offsite.study.prepare_study import prepare
from offsite.study.recipe import load_recipe
from offsite.study.stages import _PLACEMENT, settings_by_content, uncompressed_spec, with_prerequisites
from studies import RECIPE, Played, lay_out

ONE_SET = RECIPE.replace(RECIPE[RECIPE.index('[[data]]\nname = "choices"') : RECIPE.index("[[pack]]")], "")
TWO_PACKS = ONE_SET + '[[pack]]\nname = "share"\nbottom = 1\ntop = 1\nkeep = 2\nheal = "share"\n'
# Every other setting of `pack` says how blocks are compressed, which a bound does without.
COMPRESSION = {
    "bits", "calibration", "calibration_tokens", "chosen", "columns", "distill_batch_tokens", "distill_ce",
    "distill_epochs", "distill_lr", "distill_steps", "distill_tokens", "drop_from", "group", "heal", "heal_minutes",
    "keep", "mlp_width", "narrow", "narrow_by", "narrow_experts", "narrow_heads", "narrow_neurons", "narrow_widths",
    "prune", "prune_by", "refit_maps", "search_minutes", "seed", "select", "svd_rank", "zeros",
}  # fmt: skip


def keys(folder: Path, recipe: str = ONE_SET) -> dict[str, str]:
    played = Played(lay_out(folder, recipe), folder / "out")
    (point,) = played.points
    return {row: stage.key for row, stage in point.rows.items()}


def test_every_setting_of_pack_is_kept_by_the_bound_or_dropped() -> None:
    """A new one must be put on one side: the bound would silently take its default."""
    assert set(PackSpec.settings()) == _PLACEMENT | COMPRESSION
    assert not _PLACEMENT & COMPRESSION


def test_a_bound_trains_the_same_blocks_and_compresses_nothing() -> None:
    spec = PackSpec(bottom=1, top=3, keep=2, methods=("full",), max_rank=7, heal="refit", bits=4, seed=5)
    bound = uncompressed_spec(spec, 26)
    assert (bound.split.bottom, bound.split.top, bound.select.keep, bound.permits.methods, bound.permits.max_rank) == (
        1,
        3,
        26,
        ("full",),
        7,
    )
    assert (bound.heal.steps, bound.compress.bits, bound.seed) == ((), PackSpec().compress.bits, PackSpec().seed)


def test_compressors_share_all_that_none_of_them_touches(tmp_path: Path) -> None:
    played = Played(lay_out(tmp_path, TWO_PACKS), tmp_path / "out")
    one, other = played.points
    shared = {row for row in one.rows if one.rows[row].key == other.rows[row].key}
    assert shared == {"zero_shot", "full", "adapter_on_base"}
    packs = [stage for stage in played.stages.values() if stage.name == "pack"]
    assert len(packs) == 3  # one of them with nothing dropped


def test_what_a_data_set_has_of_its_own_is_tuned_with(tmp_path: Path) -> None:
    own = ONE_SET.replace("[[pack]]", "[data.tune]\nmax_steps = 2\n\n[[pack]]", 1)
    points = [
        point
        for text, out in ((ONE_SET, "one"), (own, "two"))
        for point in Played(lay_out(tmp_path, text), tmp_path / out).points
    ]
    assert [point.tune.settings["tune"]["max_steps"] for point in points] == [3, 2]
    kept = {row for row in points[0].rows if points[0].rows[row].key == points[1].rows[row].key}
    assert kept == {"zero_shot", "emulator_zero_shot"}


def test_a_key_follows_bytes_and_not_places(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    first = keys(tmp_path / "one")
    shutil.copytree(tmp_path / "one" / "base", tmp_path / "two" / "base")
    assert keys(tmp_path / "two") == first
    weights = tmp_path / "two" / "base" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    changed = keys(tmp_path / "two")
    assert not set(changed.values()) & set(first.values())


def test_a_seed_changes_tuning_alone(tmp_path: Path) -> None:
    played = Played(
        lay_out(tmp_path, ONE_SET.replace('base = "base"', 'base = "base"\nseeds = [0, 1]')), tmp_path / "out"
    )
    one, other = played.points
    assert (one.seed, other.seed) == (0, 1)
    assert one.pack.key == other.pack.key
    shared = {row for row in one.rows if one.rows[row].key == other.rows[row].key}
    assert shared == {"zero_shot", "emulator_zero_shot"}


def test_a_file_in_a_setting_counts_by_its_content(tmp_path: Path) -> None:
    texts = [tmp_path / name for name in ("one.txt", "two.txt", "other.txt")]
    for file, text in zip(texts, ("same", "same", "else"), strict=True):
        file.write_text(text)
    one, two, other = (settings_by_content(PackSpec(heal="refit", calibration=file)) for file in texts)
    assert one == two
    assert one != other


@pytest.mark.parametrize("row", ["emulator", "plug_in", "adapter_on_base"])
def test_needs_come_before_what_needs_them(tmp_path: Path, row: str) -> None:
    recipe = load_recipe(lay_out(tmp_path, ONE_SET))
    workspace, rows = prepare(recipe, tmp_path / "out", lambda _: None)
    (point,) = expand_grid(recipe, workspace, rows)
    order = [stage.key for stage in with_prerequisites(point.rows[row])]  # type: ignore[index]
    for stage in with_prerequisites(point.rows[row]):  # type: ignore[index]
        assert all(order.index(need.key) < order.index(stage.key) for need in stage.needs)
    assert order[-1] == point.rows[row].key  # type: ignore[index]
