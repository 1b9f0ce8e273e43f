import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifacts import lora_return, packed, with_earlier
from offsite.cli import data_owner, inspect_verbs, main
from offsite.config import TuneSpec
from offsite.data_owner.return_manifest import returned_tensors
from offsite.models.families.architectures import ARCHITECTURES
from offsite.protocol.home import Home
from offsite.storage.checkpoint_folder import open_checkpoint
from tiny import Parties, tiny_base

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_base(tmp_path / "base", blocks=4)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command with --json, expecting an exit code; returns what it printed on standard output."""

    def run(*words: object, code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        assert main([str(word) for word in (*words, "--json")]) == code
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    return run


def test_inspect_and_verify_along_the_chain(tmp_path: Path, base: Path, parties: Parties, run: Run) -> None:
    """Every artifact names its parent; each party sees the other's name; nothing but JSON is on standard output."""
    bundle = packed(base, tmp_path / "bundle", parties)
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner)
    plugged = run("plug-in", base, returned.folder, "--out", tmp_path / "plugged", "--home", parties.owner.folder)

    shown = run("inspect", bundle.folder, "--home", parties.data_owner.folder)
    assert shown["kind"] == "bundle"
    assert shown["lineage"] == {"base": bundle.manifest.base, "bundle": bundle.digest}
    assert shown["issuer"]["name"] == "acme"
    assert shown["recipient"]["name"] == "hospital (this home)"
    assert shown["split"] == {"bottom": 1, "emulator": 2, "top": 1}
    assert shown["may_come_back"]["blocks"] == [0, 3]
    assert shown["may_come_back"]["lora_targets"] == {path: [0, 3] for path in ARCHITECTURES["llama"].linears}
    assert shown["blocks"] == {"verbatim": [0, 3], "emulator": [1, 2]}
    assert "base_parameters" not in shown  # the data owner does not know the base
    assert shown["verified"] is True
    assert shown["bytes"] == sum(file.stat().st_size for file in bundle.folder.iterdir() if "offsite" not in file.name)

    shown = run("--home", parties.owner.folder, "inspect", returned.folder)
    assert shown["lineage"] == {"bundle": bundle.digest, "return": returned.digest}
    assert shown["signer"]["name"] == "hospital"
    assert shown["lora"] == {"rank": 4, "alpha": 8.0, "targets": 14}
    assert shown["tensors"] == 28

    assert plugged["kind"] == "plug-in"
    assert plugged["form"] == "adapter"
    assert plugged["verified"] is True
    assert list(plugged["lineage"].values())[:3] == [bundle.manifest.base, bundle.digest, returned.digest]
    for folder, kind, home in (
        (bundle.folder, "bundle", parties.data_owner),
        (returned.folder, "return", parties.owner),
        (tmp_path / "plugged", "plug-in", parties.owner),
    ):
        verified = run("verify", folder, "--home", home.folder)
        assert (verified["kind"], verified["verified"]) == (kind, True)


def test_the_owners_inspect_shows_how_much_of_the_base_is_in_a_bundle(
    tmp_path: Path, base: Path, parties: Parties, run: Run
) -> None:
    bundle = packed(base, tmp_path / "bundle", parties, keep=1)
    shown = run("inspect", bundle.folder, "--home", parties.owner.folder)
    assert shown["blocks"] == {"verbatim": [0, 2], "emulator": [1]}
    sizes = {name: math.prod(tensor.shape) for name, tensor in open_checkpoint(base).tensors.items()}
    block = sum(size for name, size in sizes.items() if ".layers.1." in name)
    assert shown["base_parameters"] == {
        "verbatim": pytest.approx(1 - block / sum(sizes.values()), abs=1e-4),
        "compressed": 0,
        "not_sent": pytest.approx(block / sum(sizes.values()), abs=1e-4),
    }
    counts = shown["tuning_multiply_adds_per_token"]
    assert counts["forward"] == counts["backward"] == 3 * counts["base"] // 4  # one of four blocks is dropped
    assert counts["share_of_lora_on_base"] == 0.75


def test_inspect_lists_where_lora_may_sit(tmp_path: Path, parties: Parties, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = packed(tiny_base(tmp_path / "base", "qwen3_moe", 6), tmp_path / "bundle", parties, bottom=2, keep=2, top=2)
    assert main(["inspect", str(bundle.folder), "--home", str(parties.data_owner.folder)]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    targets = {name: value.strip() for name, value in lines.items() if ".lora_targets." in name}
    assert targets == {
        f"may come back.lora_targets.self_attn.{name}_proj": "0, 1, 4, 5" for name in ("q", "k", "v", "o")
    }


def test_inspect_says_why_it_does_not_verify_and_does_not_fail(
    tmp_path: Path, base: Path, parties: Parties, run: Run
) -> None:
    bundle = packed(base, tmp_path / "bundle", parties)
    stranger = Home(tmp_path / "stranger")
    stranger.create_identity("stranger")
    (bundle.folder / "extra.txt").write_text("x")
    shown = run("inspect", bundle.folder, "--home", stranger.folder)
    assert shown["verified"] is False
    assert len(shown["reasons"]) == 3  # not trusted, not addressed to it, an unlisted file
    assert shown["issuer"]["name"] is None
    error = run("verify", bundle.folder, "--home", stranger.folder, code=3)["error"]
    assert error["reasons"] == shown["reasons"]


def test_inspect_works_in_a_home_without_a_key(tmp_path: Path, base: Path, parties: Parties, run: Run) -> None:
    bundle = packed(base, tmp_path / "bundle", parties)
    shown = run("inspect", bundle.folder, "--home", tmp_path / "nobody")
    assert shown["verified"] is False
    assert any("holds no key" in reason for reason in shown["reasons"])


def test_inspect_for_a_person(tmp_path: Path, base: Path, parties: Parties, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = packed(base, tmp_path / "bundle", parties)
    assert main(["inspect", str(bundle.folder), "--home", str(parties.data_owner.folder)]) == 0
    out = capsys.readouterr().out
    values = dict(line.split(None, 1) for line in out.splitlines() if not line.startswith("may come back"))
    assert values["lineage.bundle"] == bundle.digest
    assert values["verified"] == "yes"


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_what_is_no_artifact(verb: str, tmp_path: Path, run: Run) -> None:
    assert "is not a bundle, return or plug-in" in run(verb, tmp_path, code=2)["error"]["what"]


def test_the_return_is_announced_exactly(tmp_path: Path, base: Path, parties: Parties) -> None:
    """What `tune` says that the return will hold is what a return holds."""
    bundle = packed(base, tmp_path / "bundle", parties)
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner, rank=4)
    expected = returned_tensors(bundle.manifest, TuneSpec(rank=4))
    assert expected == returned.manifest.tensors
    text = data_owner.promise(bundle.manifest, TuneSpec(rank=4))
    numbers = inspect_verbs.numbers_in(returned.manifest.tensors.values())
    assert f"{len(expected)} tensors, {numbers:,} numbers" in text
    assert "blocks 0, 3 of the bundle" in text
    for file in returned.folder.iterdir():
        assert file.name in text
    full = data_owner.promise(bundle.manifest, TuneSpec(method="full"))
    assert f"({len(bundle.manifest.tensors)} tensors" in full
    assert "adapter.safetensors" in full
    assert text.endswith("no losses")


def test_checkpoints_and_scores_are_announced(tmp_path: Path, base: Path, parties: Parties, run: Run) -> None:
    bundle = packed(base, tmp_path / "bundle", parties)
    last, *earlier = (lora_return(bundle, tmp_path / f"r{i}", parties.data_owner, rank=4, seed=i) for i in range(3))
    folder = with_earlier(last, earlier, parties.data_owner, scores=[3.0, 2.5, 2.25])
    text = data_owner.promise(bundle.manifest, TuneSpec(rank=4, checkpoints=3, report_scores=True))
    assert all(file.name in text for file in folder.iterdir())
    assert "in each of 3 checkpoints" in text
    assert text.endswith("but the held-out loss of each checkpoint, as --report-scores asks")
    shown = run("inspect", folder, "--home", parties.owner.folder)
    assert (shown["checkpoints"], shown["scores"], shown["verified"]) == (3, [3.0, 2.5, 2.25], True)


def test_ranges() -> None:
    assert inspect_verbs.ranges((0, 1, 10, 12, 13)) == "0-1, 10, 12-13"
    assert inspect_verbs.ranges(()) == ""


def test_import_and_pack(tmp_path: Path, base: Path, parties: Parties, run: Run) -> None:
    out = tmp_path / "imported"
    shown = run("import", base, "--out", out)
    assert shown["kind"] == "base"
    assert shown["tensors"] > 0
    words = ["pack", out, "--out", tmp_path / "bundle", "--for", "hospital", "--home", parties.owner.folder]
    settings = ["--bottom", 1, "--top", 1, "--keep", 1, "--heal", "none", "--dtype", "fp32"]
    shown = run(*words, *settings)
    assert shown["kind"] == "bundle"
    assert shown["split"] == {"bottom": 1, "emulator": 1, "top": 1}
    assert shown["recipient"]["name"] == "hospital"
    assert "is not an empty folder" in run(*words, *settings, code=2)["error"]["what"]


def test_how_a_distillation_went_is_told(tmp_path: Path, base: Path, parties: Parties, run: Run) -> None:
    words = ["pack", base, "--out", tmp_path / "bundle", "--for", "hospital", "--home", parties.owner.folder]
    shown = run(
        *words,
        "--bottom",
        1,
        "--top",
        1,
        "--keep",
        1,
        "--heal",
        "refit,distill",
        "--distill-steps",
        2,
        "--distill-tokens",
        1024,
    )
    told = shown["distillation"]
    assert (told["steps"], told["log"]) == (2, str(tmp_path / "bundle.log.jsonl"))
    assert told["error"] > 0


def test_settings_of_pack_from_toml(tmp_path: Path, base: Path, parties: Parties, run: Run) -> None:
    config = tmp_path / "settings.toml"
    config.write_text('[pack]\nbottom = 1\ntop = 1\nkeep = 2\nheal = "none"\nmax_rank = 3\n')
    words = ["pack", base, "--out", tmp_path / "bundle", "--for", "hospital", "--home", parties.owner.folder]
    shown = run(*words, "--config", config, "--keep", 1)
    assert shown["split"] == {"bottom": 1, "emulator": 1, "top": 1}
    assert shown["may_come_back"]["max_rank"] == 3


def test_the_owner_verifies_a_return_against_its_ledger(tmp_path: Path, base: Path, parties: Parties, run: Run) -> None:
    bundle = packed(base, tmp_path / "bundle", parties, max_rank=2)
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner, rank=4)
    assert run("verify", returned.folder, "--home", parties.data_owner.folder)["verified"] is True
    refused = run("verify", returned.folder, "--home", parties.owner.folder, code=5)["error"]
    assert refused["reasons"] == ["LoRA of rank 4, the bundle permits up to 2"]
    parties.owner.ledger.unlink()
    refused = run("verify", returned.folder, "--home", parties.owner.folder, code=3)["error"]
    assert refused["reasons"] == ["it answers a bundle that this home's ledger never issued"]
