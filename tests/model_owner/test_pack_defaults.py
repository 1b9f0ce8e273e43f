"""`pack` where only the recipient is named: a bundle for every family, and a line on how its emulator was made."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from offsite.cli import main
from offsite.config import PackSpec
from offsite.errors import UsageError
from offsite.model_owner.pack import PACKING, pack
from offsite.protocol.artifacts import Base
from offsite.protocol.verify import verify_bundle
from offsite.storage.checkpoint_folder import open_checkpoint
from offsite.storage.safetensors_files import read_float32
from offsite.training.run_log import last_record, log_file
from tiny import EVERY_KIND, EVERY_VISION_KIND, KINDS, MakeBase, Parties, tiny_base, tiny_pictures, tiny_vision_base

QUICK: dict[str, Any] = {"threads": 1, "calibration_tokens": 1024}  # nothing that chooses a method
IN_FRONT = {"gemma2", "gemma3", "opt, projections, norms behind"}
EXPERTS = {kind for kind in KINDS if "moe" in kind or kind == "mixtral"}


def way(kind: str) -> str:
    """How refit finds the MLP's output layer in this kind of model."""
    if kind in EXPERTS:
        return "expert by expert"
    return "in front of the norm" if kind in IN_FRONT else "in closed form"


def base_and_data(kind: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """A tiny base of six blocks; for an encoder also pictures, since scikit-image need not be installed."""
    if kind in KINDS:
        return tiny_base(folder / "base", blocks=6, **KINDS[kind]), {}
    pictures = tiny_pictures(folder / "own", 4)
    return tiny_vision_base(folder / "base", kind, blocks=6), {"calibration": pictures}


@pytest.mark.parametrize("kind", [*EVERY_KIND, *EVERY_VISION_KIND])
def test_every_family_is_packed_with_the_defaults(kind: str, tmp_path: Path, parties: Parties) -> None:
    base, given = base_and_data(kind, tmp_path)
    bundle = pack(Base(base), tmp_path / "bundle", "hospital", PackSpec(**QUICK, **given), parties.owner)
    split = bundle.manifest.split
    assert (split.bottom, split.emulator, split.top) == (2, 2, 2)
    assert verify_bundle(bundle.folder, parties.data_owner).digest == bundle.digest
    record = last_record(log_file(bundle.folder), PACKING)
    assert record is not None
    healed = "not healed" if kind in IN_FRONT else f"refit of mlp {way(kind)}"
    made = f"all 2 blocks, 50% of each matrix zero by sparsegpt, {healed}"
    assert record["emulator"] == f"{bundle.manifest.architecture}: {made}"


@pytest.mark.parametrize("kind", [*EVERY_KIND, *EVERY_VISION_KIND])
def test_every_family_is_packed_with_the_defaults_of_dropped_blocks(
    kind: str, tmp_path: Path, parties: Parties
) -> None:
    base, given = base_and_data(kind, tmp_path)
    bundle = pack(Base(base), tmp_path / "bundle", "hospital", PackSpec(keep=1, **QUICK, **given), parties.owner)
    record = last_record(log_file(bundle.folder), PACKING)
    assert record is not None
    made = f"1 of 2 blocks by uniform, refit of mlp {way(kind)}"
    assert record["emulator"] == f"{bundle.manifest.architecture}: {made}"


@pytest.mark.parametrize("kind", EVERY_VISION_KIND)
def test_an_encoder_without_pictures_is_pruned_by_magnitude(
    kind: str, tmp_path: Path, parties: Parties, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "skimage" else find(name, *more)
    )
    base = tiny_vision_base(tmp_path / "base", kind, blocks=6)
    bundle = pack(Base(base), tmp_path / "bundle", "hospital", PackSpec(**QUICK), parties.owner)
    record = last_record(log_file(bundle.folder), PACKING)
    assert record is not None
    made = "all 2 blocks, 50% of each matrix zero by magnitude, not healed for want of pictures (--calibration FOLDER)"
    assert record["emulator"] == f"{bundle.manifest.architecture}: {made}"
    for asked in ({"heal": "refit", "keep": 1}, {"prune_by": "wanda"}, {"select": "influence"}):
        with pytest.raises(UsageError, match="scikit-image are not installed") as caught:
            pack(Base(base), tmp_path / "out", "hospital", PackSpec(**QUICK, **asked), parties.owner)
        assert "--calibration" in (caught.value.next_step or "")
        assert not log_file(tmp_path / "out").exists()  # refused before any work


@pytest.mark.parametrize(("blocks", "split"), [(2, (0, 1, 1)), (3, (1, 1, 1)), (4, (1, 1, 2)), (5, (2, 1, 2))])
def test_a_small_base_is_packed_with_the_defaults(
    blocks: int, split: tuple[int, int, int], tmp_path: Path, base_of: MakeBase, parties: Parties
) -> None:
    bundle = pack(Base(base_of(blocks=blocks)), tmp_path / "out", "hospital", PackSpec(**QUICK), parties.owner)
    found = bundle.manifest.split
    assert (found.bottom, found.emulator, found.top) == split


@pytest.mark.parametrize(("blocks", "keep", "instead"), [(1, None, "at least two blocks"), (4, 4, "--keep below 4")])
def test_where_nothing_would_train(
    blocks: int, keep: int | None, instead: str, tmp_path: Path, base_of: MakeBase, parties: Parties
) -> None:
    with pytest.raises(UsageError, match="nothing would train") as caught:
        pack(Base(base_of(blocks=blocks)), tmp_path / "out", "hospital", PackSpec(keep=keep, **QUICK), parties.owner)
    assert instead in (caught.value.next_step or "")


@pytest.mark.parametrize(
    "settings",
    [
        {"select": "influence"},
        {"select": "random"},
        {"select": "cluster"},
        {"select": "contiguous", "drop_from": 4},
        {"heal": "share"},
        {"heal": "affine", "prune": 0.25},
        {"heal": "none"},
        {"zeros": "left-out", "keep": 2},
        {"keep": 5},
    ],
)
def test_one_setting_needs_no_other(
    settings: dict[str, Any], tmp_path: Path, base_of: MakeBase, parties: Parties
) -> None:
    spec = PackSpec.model_validate({**QUICK, **settings})
    bundle = pack(Base(base_of(blocks=8)), tmp_path / "out", "hospital", spec, parties.owner)
    assert verify_bundle(bundle.folder, parties.data_owner).digest == bundle.digest


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_what_loses_nothing_is_the_base(kind: str, tmp_path: Path, parties: Parties) -> None:
    base = tiny_base(tmp_path / "base", blocks=5, **KINDS[kind])
    spec = PackSpec(prune=0.0, dtype="fp32", **QUICK)
    bundle = pack(Base(base), tmp_path / "bundle", "hospital", spec, parties.owner)
    own, held = open_checkpoint(base).tensors, open_checkpoint(bundle.folder).tensors
    assert held.keys() <= own.keys()
    assert all((read_float32(tensor) == read_float32(own[name])).all() for name, tensor in held.items())


@pytest.mark.parametrize("asked", [{"heal": "refit"}, {"refit_maps": "mlp"}])
def test_refit_in_front_of_a_norm_runs_where_it_is_asked_for(
    asked: dict[str, Any], tmp_path: Path, base_of: MakeBase, parties: Parties
) -> None:
    spec = PackSpec.model_validate({**QUICK, **asked})
    bundle = pack(Base(base_of("gemma2", 6)), tmp_path / "out", "hospital", spec, parties.owner)
    record = last_record(log_file(bundle.folder), PACKING)
    assert record is not None
    assert record["emulator"].endswith("refit of mlp in front of the norm")


def test_the_line_is_in_the_output_the_json_and_the_plan(
    tmp_path: Path, base_of: MakeBase, parties: Parties, capsys: pytest.CaptureFixture[str]
) -> None:
    made = "gemma2: 1 of 2 blocks by uniform, refit of mlp in front of the norm"
    settings = tmp_path / "settings.toml"
    settings.write_text("[pack]\nthreads = 1\ncalibration_tokens = 1024\n")
    words = ["pack", str(base_of("gemma2", 6)), "--for", "hospital", "--keep", "1", "--config", str(settings)]
    words += ["--home", str(parties.owner.folder)]
    assert main([*words, "--out", str(tmp_path / "plan"), "--plan"]) == 0
    assert f"emulator  {made}" in capsys.readouterr().out
    assert main([*words, "--out", str(tmp_path / "plan"), "--plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["emulator"] == made
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    assert made in capsys.readouterr().out
    assert main([*words, "--out", str(tmp_path / "two"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["emulator"] == made
