import pytest

from offsite.cli import main


def completed(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What bash offers for the last word of a command line."""
    monkeypatch.setenv("_OFFSITE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 0
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("offsite pa", {"pack"}),
        ("offsite trust ", {"add", "list", "remove"}),
        ("offsite tune --me", {"--memory", "--method"}),
        ("offsite tune --method b", {"bitfit", "bottleneck"}),
        ("offsite pack base --heal refit,a", {"refit,affine"}),
        ("offsite compare base --show", {"--show-rows"}),
    ],
)
def test_commands_flags_and_choices_are_completed(
    line: str, offered: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(completed(line, monkeypatch, capsys)) == offered


def test_it_can_be_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "--install-completion" in printed
    assert "--show-completion" in printed
