import json
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from offsite.cli import main
from offsite.cli.starter_file import STARTER_FILE, Party, render_starter_file
from offsite.config import TABLES, load_spec
from offsite.protocol.home import Home
from offsite.protocol.signing import PublicKey


def settings_of(text: str) -> list[tuple[str, str]]:
    """The table and the line of each setting that is commented out."""
    found, table = [], ""
    for line in text.splitlines():
        if line.startswith("["):
            table = line.strip("[]")
        elif line.startswith("#") and not line.startswith("# "):
            found.append((table, line[1:]))
    return found


@pytest.mark.parametrize("party", get_args(Party))
def test_the_settings_file_changes_nothing_until_it_is_edited(party: Party, tmp_path: Path) -> None:
    file = tmp_path / STARTER_FILE
    file.write_text(render_starter_file(party))
    for spec in TABLES.values():
        assert load_spec(spec, {}, file) == spec()


@pytest.mark.parametrize("party", get_args(Party))
def test_each_setting_works_as_it_stands(party: Party, tmp_path: Path) -> None:
    """With the # taken off, one at a time; what has a default has it there."""
    listed = settings_of(render_starter_file(party))
    assert len(listed) > 15
    for table, line in listed:
        file = tmp_path / STARTER_FILE
        file.write_text(f"[{table}]\n{line}\n")
        spec = load_spec(TABLES[table], {}, file)
        (key,) = tomllib.loads(line)
        setting = TABLES[table].settings()[key]
        assert setting.field.default is None or setting.of(spec) == setting.of(TABLES[table]())
        assert spec.explicit_keys == {key}


def test_one_party_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home, out = tmp_path / "home", tmp_path / "my folder"
    assert main(["init", "--data", "hospital", "--home", str(home), "--out", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    identity = Home(home).identity()
    assert identity.name == "hospital"
    assert PublicKey.from_openssh((out / "hospital.pub").read_text()) == identity.public_key
    assert facts["fingerprint"] == identity.public_key.fingerprint
    assert facts["key_made"] is True
    assert (out / STARTER_FILE).read_text() == render_starter_file("data")
    assert any(f"'{out}/{STARTER_FILE}'" in step for step in facts["next"])
    assert not any("{" in step for step in facts["next"])


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    words = ["init", "--owner", "acme", "--home", str(home), "--out", str(out)]
    assert main(words) == 0
    key = Home(home).identity().public_key
    before = {file: file.read_bytes() for file in [*home.iterdir(), *out.iterdir()] if file.is_file()}
    assert main(words) == 2
    assert f"{out / 'acme.pub'} and {out / STARTER_FILE} exist already" in capsys.readouterr().err
    assert main([*words[:-1], str(tmp_path / "second")]) == 0  # the home's own key again, in another folder
    assert PublicKey.from_openssh((tmp_path / "second" / "acme.pub").read_text()) == key
    assert main(["init", "--data", "other", "--home", str(home), "--out", str(tmp_path / "third")]) == 2
    assert "this party is 'acme'" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()
    assert {file: file.read_bytes() for file in before} == before


@pytest.mark.parametrize("words", [[], ["--owner", "a", "--data", "b"], ["--owner", "no name"]])
def test_wrong_words_leave_nothing(words: list[str], tmp_path: Path) -> None:
    assert main(["init", *words, "--home", str(tmp_path / "home"), "--out", str(tmp_path / "out")]) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_key_is_not_put_into_a_bundle(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    assert main(["init", "--owner", "acme", "--home", str(tmp_path / "home"), "--out", str(folder)]) == 2
    assert not (tmp_path / "home").exists()
