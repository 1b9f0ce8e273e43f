"""Commands end with the next one to type, whose verb and flags are there, and whose paths a shell reads as one word."""

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from offsite.cli import inspect_verbs, main
from offsite.cli.app import build
from tiny import Parties, tiny_base, tiny_bundle


def next_commands(err: str) -> list[list[str]]:
    """The words of every command that was printed as the next one."""
    return [shlex.split(line.partition("next: offsite ")[2]) for line in err.splitlines() if "next: offsite " in line]


def require_there(words: list[str]) -> None:
    """A command's verb and its flags exist."""
    group: Any = typer.main.get_command(build())
    command = group.commands[words[0]]
    command = command.commands[words[1]] if hasattr(command, "commands") else command
    known = {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("kind", ["bundle", "return", "plug-in"])
def test_what_follows_a_verified_artifact_is_a_command(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    inspect_verbs.hint_next(kind, Path("my folder/it"))
    [words] = next_commands(capsys.readouterr().err)
    assert "my folder/it" in words
    require_there(words)


def test_verbs_end_with_the_next_command(
    tmp_path: Path, parties: Parties, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bundle = tiny_bundle(tiny_base(tmp_path / "base", blocks=3), tmp_path / "a bundle", parties, keep=1)
    home, tuner = str(parties.owner.folder), str(parties.data_owner.folder)
    for words in (
        ["keygen", "--out", str(tmp_path / "acme.pub"), "--home", home],
        ["trust", "add", "other", str(tmp_path / "acme.pub"), "--home", str(tmp_path / "third")],
        ["trust", "list", "--home", home],
        ["trust", "remove", "hospital", "--home", home],
        ["verify", str(bundle.folder), "--home", tuner],
        ["inspect", str(bundle.folder), "--home", tuner],
    ):
        capsys.readouterr()
        assert main(words) == 0
        found = next_commands(capsys.readouterr().err)
        assert found, words
        for one in found:
            require_there(one)
