"""`--plan` on the command line: it writes nothing, says so, and measures when asked."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from artifacts import full_return, lora_return, packed
from fresh_process import HEAVY, modules_after
from offsite.cli import main
from offsite.cli.flags import with_plan_mode
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
    def run(*words: object, plan: Sequence[str] = ("--plan",)) -> dict[str, Any]:
        capsys.readouterr()
        assert main([str(word) for word in (*words, *plan, "--json")]) == 0
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("plan", [("--plan",), ("--plan", "measure"), ("--plan=measure",)])
def test_planning_leaves_no_trace(
    tmp_path: Path, base: Path, parties: Parties, rows: Path, run: Run, plan: tuple[str, ...]
) -> None:
    bundle = packed(base, tmp_path / "bundle", parties)
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner)
    before = contents(tmp_path)
    owner, data_owner = ("--home", parties.owner.folder), ("--home", parties.data_owner.folder)
    pack = ("pack", base, "--out", tmp_path / "new", "--for", "hospital", "--bottom", 1, "--top", 1, "--keep", 1)
    plans = [run(*pack, *owner, plan=plan)]
    plans.append(run("tune", bundle.folder, "--data", rows, "--out", tmp_path / "new", *data_owner, plan=plan))
    for form in ("adapter", "merged"):
        run("plug-in", base, returned.folder, "--out", tmp_path / "new", "--as", form, *owner)
    assert contents(tmp_path) == before
    assert not (tmp_path / "new").exists()
    for one in plans:
        assert (one["measured"] is not None) is ("measure" in plan[-1])
        if one["measured"]:
            assert one["measured"]["run_seconds"] > 0
            assert one["measured"]["peak_bytes"] > one["memory"][0]["bytes"]


def test_plugging_in_has_nothing_to_measure(
    tmp_path: Path, base: Path, bundle: Bundle, parties: Parties, capsys: pytest.CaptureFixture[str]
) -> None:
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner)
    words = ["plug-in", base, returned.folder, "--out", tmp_path / "new", "--home", parties.owner.folder]
    assert main([str(word) for word in (*words, "--plan", "measure")]) == 2
    assert "nothing to measure" in capsys.readouterr().err
    assert main([str(word) for word in (*words, "--plan=everything")]) == 2
    assert "no --plan everything" in capsys.readouterr().err


def test_the_plan_may_stand_before_a_folder(tmp_path: Path, base: Path, parties: Parties, run: Run) -> None:
    words = ("--plan", base, "--out", tmp_path / "new", "--for", "hospital", "--home", parties.owner.folder)
    assert run("pack", *words, plan=())["measured"] is None
    assert run("pack", "--keep", 1, "--plan", "measure", *words[1:], plan=())["kind"] == "plan"
    assert with_plan_mode(["--plan", "--", "--plan"]) == ["--plan=headers", "--", "--plan"]


def test_a_flag_for_epochs_wins_over_steps_in_a_file(
    tmp_path: Path, bundle: Bundle, parties: Parties, rows: Path, run: Run
) -> None:
    (tmp_path / "settings.toml").write_text("[tune]\nmax_steps = 2\nbatch_size = 1\n")
    words = ["tune", bundle.folder, "--data", rows, "--out", tmp_path / "new", "--home", parties.data_owner.folder]
    words += ["--config", tmp_path / "settings.toml"]
    assert run(*words)["steps"] == 2
    assert run(*words, "--epochs", 4)["steps"] == 4 * 5


def test_planning_on_the_owners_side_imports_no_torch(
    tmp_path: Path, base: Path, bundle: Bundle, parties: Parties
) -> None:
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner)
    out = ("--out", tmp_path / "new", "--plan", "--home", parties.owner.folder)
    encoder, pictures = tiny_vision_base(tmp_path / "encoder", blocks=4), tiny_pictures(tmp_path / "set", 2)
    small = ("--for", "hospital", "--keep", 1, "--bottom", 1, "--top", 1)
    for words in (
        ("pack", base, *small, *out),
        ("plug-in", base, returned.folder, *out),
        ("pack", encoder, *small, "--calibration", pictures, *out),
    ):
        loaded = modules_after(*words)
        assert not HEAVY & loaded
        assert "pydantic" in loaded  # it did plan


def test_pack_needs_a_key_and_a_trusted_recipient_to_plan(
    tmp_path: Path, base: Path, parties: Parties, capsys: pytest.CaptureFixture[str]
) -> None:
    for recipient, home in (("hospital", tmp_path / "nobody"), ("anybody", parties.owner.folder)):
        words = ("pack", base, "--out", tmp_path / "new", "--for", recipient, "--keep", 1, "--home", home)
        assert main([str(word) for word in words]) == main([str(word) for word in (*words, "--plan")]) == 2
    assert "anybody" in capsys.readouterr().err
    assert not (tmp_path / "nobody").exists()


def test_the_json_of_a_pack(tmp_path: Path, base: Path, parties: Parties, run: Run) -> None:
    words = ("pack", base, "--out", tmp_path / "new", "--for", "hospital", "--home", parties.owner.folder)
    plan = run(*words, "--keep", 2, "--bottom", 1, "--top", 1)
    assert [part["name"] for part in plan["bundle"]] == [
        "embeddings", "bottom", "emulator", "top", "final norm", "head",
    ]  # fmt: skip
    assert [part["blocks"] for part in plan["bundle"]] == [0, 1, 2, 1, 0, 0]
    assert [memory["compute"] for memory in plan["memory"]] == ["bf16", "fp32"]  # the device is not known yet
    for memory in plan["memory"]:
        assert memory["bytes"] == sum(memory["weights"].values())
    assert plan["work"] == ["heal by refit of mlp in closed form"]
    assert plan["disk_bytes"] > sum(plan["files"].values())
    assert plan["disk_free_bytes"] > 0


def test_a_plan_for_a_person(
    tmp_path: Path, base: Path, bundle: Bundle, parties: Parties, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["pack", base, "--out", tmp_path / "new", "--for", "hospital", "--home", parties.owner.folder]
    words += ["--bottom", 1, "--top", 1, "--keep", 1]
    assert main([str(word) for word in (*words, "--plan")]) == 0
    out = capsys.readouterr().out
    assert "in memory, computing in bf16" in out
    assert "in memory, computing in fp32" in out
    assert "`--plan measure`" in out
    assert "nothing was written" in out
    words = ["tune", bundle.folder, "--data", rows, "--out", tmp_path / "new", "--home", parties.data_owner.folder]
    assert main([str(word) for word in (*words, "--plan")]) == 0
    out = capsys.readouterr().out
    assert "trained parameters" in out
    assert "rows  5" in out
    assert main([str(word) for word in (*words, "--plan", "measure")]) == 0
    out = capsys.readouterr().out
    assert "measured on this machine" in out
    assert "5 longest rows" in out


def test_a_full_plug_in(tmp_path: Path, base: Path, bundle: Bundle, parties: Parties, run: Run) -> None:
    returned = full_return(bundle, tmp_path / "return", parties.data_owner)
    words = ("plug-in", base, returned.folder, "--out", tmp_path / "new", "--home", parties.owner.folder)
    plan = run(*words)
    assert (plan["form"], plan["changed_tensors"]) == ("merged", len(bundle.manifest.tensors))
    assert main([str(word) for word in (*words, "--plan", "--as", "adapter", "--json")]) == 2
