"""`--plan`: what it says is what then happens, and saying it does nothing and needs no torch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifacts import full_return, lora_return, packed
from fresh_process import HEAVY, modules_after
from offsite.cli import main
from offsite.config import PackSpec
from offsite.protocol.artifacts import Bundle
from tiny import Parties, tiny_base, tiny_pictures, tiny_vision_base

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_base(tmp_path / "base", blocks=6)


@pytest.fixture
def bundle(tmp_path: Path, base: Path, parties: Parties) -> Bundle:
    return packed(base, tmp_path / "bundle", parties)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": "add", "completion": f" {i}"}) + "\n" for i in range(5)))
    return file


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*words: object) -> dict[str, Any]:
        capsys.readouterr()
        assert main([str(word) for word in (*words, "--plan", "--json")]) == 0
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_planning_leaves_no_trace(tmp_path: Path, base: Path, parties: Parties, rows: Path, run: Run) -> None:
    bundle = packed(base, tmp_path / "bundle", parties)
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner)
    before = contents(tmp_path)
    owner, data_owner = ("--home", parties.owner.folder), ("--home", parties.data_owner.folder)
    run("pack", base, "--out", tmp_path / "new", "--for", "hospital", "--keep", 1, *owner)
    run("tune", bundle.folder, "--data", rows, "--out", tmp_path / "new", *data_owner)
    for form in ("adapter", "merged"):
        run("plug-in", base, returned.folder, "--out", tmp_path / "new", "--as", form, *owner)
    assert contents(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_a_flag_for_epochs_wins_over_steps_in_a_file(
    tmp_path: Path, bundle: Bundle, parties: Parties, rows: Path, run: Run
) -> None:
    (tmp_path / "settings.toml").write_text("[tune]\nmax_steps = 2\nbatch_size = 1\n")
    words = ["tune", bundle.folder, "--data", rows, "--out", tmp_path / "new", "--home", parties.data_owner.folder]
    words += ["--config", tmp_path / "settings.toml"]
    assert run(*words)["steps"] == 2
    assert run(*words, "--epochs", 4)["steps"] == 4 * 5


def test_planning_imports_no_torch(tmp_path: Path, base: Path, bundle: Bundle, parties: Parties, rows: Path) -> None:
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner)
    out = ("--out", tmp_path / "new", "--plan")
    encoder, pictures = tiny_vision_base(tmp_path / "encoder", blocks=4), tiny_pictures(tmp_path / "set", 2)
    seen = packed(encoder, tmp_path / "seen", parties, keep=1)
    for words in (
        ("pack", base, "--for", "hospital", "--keep", 1, "--home", parties.owner.folder, *out),
        ("tune", bundle.folder, "--data", rows, "--home", parties.data_owner.folder, *out),
        ("plug-in", base, returned.folder, "--home", parties.owner.folder, *out),
        ("pack", encoder, "--for", "x", "--keep", 1, "--bottom", 1, "--top", 1, "--calibration", pictures, *out),
        ("tune", seen.folder, "--data", pictures, "--home", parties.data_owner.folder, *out),
    ):
        loaded = modules_after(*words)
        assert not HEAVY & loaded
        assert "pydantic" in loaded  # it did plan


def test_pack_needs_no_key_to_plan(tmp_path: Path, base: Path, run: Run) -> None:
    plan = run("pack", base, "--out", tmp_path / "new", "--for", "anybody", "--keep", 1, "--home", tmp_path / "nobody")
    assert plan["kind"] == "plan"
    assert not (tmp_path / "nobody").exists()


def test_the_json_of_a_pack(tmp_path: Path, base: Path, run: Run) -> None:
    plan = run("pack", base, "--out", tmp_path / "new", "--for", "x", "--keep", 2, "--bottom", 1, "--top", 1)
    assert [part["name"] for part in plan["bundle"]] == [
        "embeddings", "bottom", "emulator", "top", "final norm", "head",
    ]  # fmt: skip
    assert [part["blocks"] for part in plan["bundle"]] == [0, 1, 2, 1, 0, 0]
    tokens = PackSpec().calibration.tokens
    assert plan["calibration"] == {"sequences": tokens // 64, "length": 64, "tokens": tokens}  # the context is 64
    for phase in plan["phases"]:
        assert phase["bytes"] == sum(term["bytes"] for term in phase["terms"])
        assert all(term["formula"] for term in phase["terms"])
    assert plan["peak"]["bytes"] == max(phase["bytes"] for phase in plan["phases"])
    assert plan["disk_bytes"] > plan["bundle_bytes"]
    assert plan["disk_free_bytes"] > 0


def test_a_plan_for_a_person(
    tmp_path: Path, base: Path, bundle: Bundle, parties: Parties, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["pack", base, "--out", tmp_path / "new", "--for", "x", "--keep", "1"]
    assert main([str(word) for word in (*words, "--plan")]) == 0
    out = capsys.readouterr().out
    assert "memory while solving for a projection" in out
    assert "nothing was done yet" in out
    words = ["tune", bundle.folder, "--data", rows, "--out", tmp_path / "new", "--home", parties.data_owner.folder]
    assert main([str(word) for word in (*words, "--plan")]) == 0
    out = capsys.readouterr().out
    assert "trained parameters" in out
    assert "rows  5" in out


def test_a_full_plug_in(tmp_path: Path, base: Path, bundle: Bundle, parties: Parties, run: Run) -> None:
    returned = full_return(bundle, tmp_path / "return", parties.data_owner)
    words = ("plug-in", base, returned.folder, "--out", tmp_path / "new", "--home", parties.owner.folder)
    plan = run(*words)
    assert (plan["form"], plan["changed"]) == ("merged", len(bundle.manifest.tensors))
    assert main([str(word) for word in (*words, "--plan", "--as", "adapter", "--json")]) == 2
