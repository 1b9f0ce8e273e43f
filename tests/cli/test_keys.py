import json
import stat
from pathlib import Path

import pytest

from offsite.cli import main
from offsite.protocol.home import Home


def run(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, object]:
    assert main([str(word) for word in (*words, "--json")]) == 0
    result: dict[str, object] = json.loads(capsys.readouterr().out)
    return result


def test_keygen_and_export_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home, public = tmp_path / "home", tmp_path / "acme.pub"
    made = run(capsys, "keygen", "--home", home, "--name", "acme", "--out", public)
    assert made["name"] == "acme"
    assert made["fingerprint"] == Home(home).identity().public_key.fingerprint
    assert stat.S_IMODE((home / "key.pem").stat().st_mode) == 0o600
    first = public.read_text()
    assert first.startswith("ssh-ed25519 ")
    assert first.endswith(" acme\n")
    again = run(capsys, "--home", home, "keygen", "--out", tmp_path / "again.pub")
    assert again["fingerprint"] == made["fingerprint"]
    assert (tmp_path / "again.pub").read_text() == first


def test_keygen_never_replaces_a_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "keygen", "--home", tmp_path, "--name", "acme", "--out", tmp_path / "a.pub")
    key = (tmp_path / "key.pem").read_bytes()
    assert main(["keygen", "--home", str(tmp_path), "--name", "acme", "--out", str(tmp_path / "b.pub")]) == 2
    assert (tmp_path / "key.pem").read_bytes() == key
    assert not (tmp_path / "b.pub").exists()


@pytest.mark.parametrize("name", [None, "acme"])
def test_keygen_overwrites_nothing_else(name: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither the private key nor somebody's rows."""
    home, rows = tmp_path / "home", tmp_path / "rows.jsonl"
    rows.write_text('{"text": "precious"}')
    naming = ["--name", name] if name else []
    if not name:
        run(capsys, "keygen", "--home", home, "--name", "acme", "--out", tmp_path / "acme.pub")
        run(capsys, "keygen", "--home", home, "--out", tmp_path / "acme.pub")  # the same key is no loss
        key = (home / "key.pem").read_bytes()
        assert main(["keygen", "--home", str(home), "--out", str(home / "key.pem")]) == 2
        assert (home / "key.pem").read_bytes() == key
    assert main(["keygen", "--home", str(home), *naming, "--out", str(rows)]) == 2
    assert "is not a public key" in capsys.readouterr().err
    assert rows.read_text() == '{"text": "precious"}'
    assert (home / "key.pem").exists() == (name is None)


def test_export_without_a_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keygen", "--home", str(tmp_path / "none"), "--out", str(tmp_path / "a.pub")]) == 2
    assert "holds no key" in capsys.readouterr().err


def test_the_home_comes_from_flag_then_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OFFSITE_HOME", str(tmp_path / "env"))
    out = tmp_path / "x.pub"
    assert run(capsys, "keygen", "--name", "a", "--out", out)["home"] == str(tmp_path / "env")
    before = ["--home", tmp_path / "before"]
    assert run(capsys, *before, "keygen", "--name", "b", "--out", out)["home"] == str(tmp_path / "before")
    after = ["--home", tmp_path / "after"]
    assert run(capsys, *before, "keygen", "--name", "c", "--out", out, *after)["home"] == str(tmp_path / "after")


def test_trust_add_list_remove(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    public = tmp_path / "hospital.pub"
    made = run(capsys, "keygen", "--home", tmp_path / "hospital", "--name", "hospital", "--out", public)
    home = tmp_path / "acme"
    added = run(capsys, "trust", "add", "hospital", public, "--home", home)
    assert added == {"name": "hospital", "fingerprint": made["fingerprint"], "role": None}
    assert run(capsys, "--home", home, "trust", "list") == {"trusted": [added]}
    assert main(["trust", "list", "--home", str(home)]) == 0
    assert capsys.readouterr().out == f"hospital  {made['fingerprint']}\n"
    assert run(capsys, "trust", "remove", "hospital", "--home", home) == {"removed": "hospital"}
    assert run(capsys, "trust", "list", "--home", home) == {"trusted": []}
    assert main(["trust", "list", "--home", str(home)]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [None, "no key at all\n", b"\xff\xfe"])
def test_trust_refuses_what_is_no_key(
    content: str | bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.pub"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["trust", "add", "x", str(file), "--home", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
