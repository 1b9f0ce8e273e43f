"""Every verb that writes refuses a place inside what it would change, and takes names of every kind."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from artifacts import copied_folder, lora_return
from offsite.cli import main
from offsite.protocol.verify import verify_bundle
from tiny import MakeBase, Parties, tiny_bundle, tiny_parties, tiny_rows

QUICK = ("--rank", "2", "--max-steps", "1", "--batch-size", "4")
World = tuple[Path, Parties]


@pytest.fixture
def world(base_of: MakeBase, tmp_path: Path) -> World:
    """A folder with a base, a bundle of it, a return and rows, and the two homes."""
    parties = tiny_parties(tmp_path)
    base = copied_folder(base_of("llama", 3), tmp_path / "base")
    bundle = tiny_bundle(base, tmp_path / "bundle", parties, keep=1)
    lora_return(bundle, tmp_path / "return", parties.data_owner)
    tiny_rows(tmp_path / "rows.jsonl", 8)
    return tmp_path, parties


def words(verb: str, world: World, out: Path) -> list[str]:
    folder, parties = world
    owner, tuner = ["--home", str(parties.owner.folder)], ["--home", str(parties.data_owner.folder)]
    rows, split = (
        ["--data", str(folder / "rows.jsonl")],
        ["--bottom", "1", "--top", "1", "--keep", "1", "--heal", "none"],
    )
    tune = ["tune", str(folder / "bundle"), *rows, *tuner, *QUICK]
    return {
        "import": ["import", str(folder / "base"), "--out", str(out)],
        "pack": ["pack", str(folder / "base"), "--for", "hospital", *split, *owner, "--out", str(out)],
        "tune": [*tune, "--out", str(out)],
        "plug-in": ["plug-in", str(folder / "base"), str(folder / "return"), *owner, "--out", str(out)],
        "keygen": ["keygen", *owner, "--out", str(out)],
        "eval": ["eval", str(folder / "base"), *rows, "--row-scores", str(out)],
        "full-fine-tuning": ["full-fine-tuning", str(folder / "base"), *rows, "--out", str(out)],
        "tensorboard": [*tune, "--out", str(folder / "new"), "--tensorboard", str(out)],
        "demo": ["demo", "--workdir", str(out)],
    }[verb]  # fmt: skip


def error_of(capsys: pytest.CaptureFixture[str], *command: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*command, *([] if command[0] == "demo" else ["--json"])]) == 2
    captured = capsys.readouterr()
    if command[0] == "demo":
        return {"what": captured.err, "next_step": captured.err.partition("next: ")[2]}
    error: dict[str, Any] = json.loads(captured.out)["error"]
    return error


@pytest.mark.parametrize(
    "verb", ["import", "pack", "tune", "plug-in", "keygen", "eval", "full-fine-tuning", "tensorboard", "demo"]
)
@pytest.mark.parametrize("place", ["base", "bundle", "return"])
def test_no_verb_writes_into_an_artifact_or_a_model(
    verb: str, place: str, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = world[0]
    before = sorted(folder.rglob("*"))
    error = error_of(capsys, *words(verb, world, folder / place / "x"))
    assert "is inside the" in error["what"]
    assert str(folder / "x") in error["next_step"]
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("verb", ["import", "pack", "tune", "plug-in", "full-fine-tuning"])
def test_an_input_is_no_place_for_the_result(verb: str, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    folder = world[0]
    given = folder / ("bundle" if verb == "tune" else "base")
    assert "that the command reads" in error_of(capsys, *words(verb, world, given))["what"]


def test_plans_refuse_it_too(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    folder = world[0]
    for verb in ("pack", "tune", "plug-in"):
        error = error_of(capsys, *words(verb, world, folder / "bundle" / "x"), "--plan")
        assert "is inside the bundle" in error["what"]


@pytest.mark.parametrize(
    "name", ["with a space", "-dash", "quo'te", "\u00e4\u00e9 \u65e5\u672c", "x" * 240, "a.b.c", "$HOME"]
)
def test_results_have_any_name(
    name: str, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, parties = world
    monkeypatch.chdir(folder)
    assert main(words("pack", world, Path(name))) == 0
    assert verify_bundle(folder / name, parties.data_owner).folder.name == name
    command = ["verify", name, "--home", str(parties.data_owner.folder), "--json"]
    capsys.readouterr()
    if name.startswith("-"):  # looks like a flag
        error = error_of(capsys, *command[:-1])
        assert error["next_step"] == "write ./-dash for the file or folder -dash"
        command[1] = "./-dash"
    assert main(command) == 0


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_names_in_the_other_form_of_unicode(
    stored: Any, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, parties = world
    monkeypatch.chdir(folder)
    names = {name: unicodedata.normalize(stored, f"{name} \u00e9\u00e4") for name in ("bundle", "rows", "key")}
    typed = {name: unicodedata.normalize("NFC" if stored == "NFD" else "NFD", there) for name, there in names.items()}
    (folder / "bundle").rename(names["bundle"])
    (folder / "rows.jsonl").rename(names["rows"])
    home = ["--home", str(parties.data_owner.folder)]
    assert main(["tune", typed["bundle"], "--data", typed["rows"], *home, *QUICK, "--out", "out"]) == 0
    assert (
        "that the command reads"
        in error_of(capsys, "tune", names["bundle"], "--data", typed["rows"], *home, "--out", typed["bundle"])["what"]
    )
    Path(names["key"]).write_text(parties.owner.identity().public_key.openssh("acme"))
    assert main(["trust", "add", "acme", typed["key"], *home]) == 0


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_text_files_that_a_person_wrote_have_any_encoding_with_a_mark(
    encoding: str, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, parties = world
    home = ["--home", str(parties.data_owner.folder)]
    (folder / "settings.toml").write_text("[tune]\nrank = 3  # \u00e4\n", encoding=encoding)
    (folder / "acme.pub").write_text(parties.owner.identity().public_key.openssh("acme"), encoding=encoding)
    (folder / "marked.jsonl").write_text((folder / "rows.jsonl").read_text(), encoding=encoding)
    assert main(["trust", "add", "acme", str(folder / "acme.pub"), *home]) == 0
    more = ["--config", str(folder / "settings.toml"), "--max-steps", "1", "--batch-size", "4", "--json", *home]
    capsys.readouterr()
    marked = str(folder / "marked.jsonl")
    assert main(["tune", str(folder / "bundle"), "--data", marked, "--out", str(folder / "out"), *more]) == 0
    assert json.loads(capsys.readouterr().out)["lora"]["rank"] == 3
