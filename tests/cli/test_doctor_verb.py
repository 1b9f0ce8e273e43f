import json
from pathlib import Path

import pytest

from offsite.cli import main
from offsite.protocol.home import Home
from offsite.study.doctor.finding import Finding


def test_a_person_sees_facts_and_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--quick", "--home", str(tmp_path / "home")]) == 0
    printed = capsys.readouterr().out
    for part in ("versions\n", "extras\n", "home\n", "machine\n", "  torch ", "  disk free home "):
        assert part in printed
    assert "advice: " in printed
    assert "apart from the advice above" in printed
    assert "self test" not in printed
    assert not (tmp_path / "home").exists()


def test_the_first_problem_is_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Home(tmp_path).create_identity("acme")
    found = ({"seconds": {"pack": 1.0}}, [Finding("problem", "it \x1b[2Jfailed", "do this", 4)])
    monkeypatch.setattr("offsite.study.doctor.self_test.run_self_test", lambda progress: found)
    assert main(["doctor", "--home", str(tmp_path), "--json"]) == 4
    facts = json.loads(capsys.readouterr().out)
    assert facts["well"] is False
    assert facts["home"]["key"].startswith("acme: ")
    assert [one["exit_code"] for one in facts["findings"] if one["level"] == "problem"] == [4]
    assert facts["machine"]["disk_free_bytes"]["home"] > 0
    assert main(["doctor", "--home", str(tmp_path)]) == 4
    printed = capsys.readouterr().out
    assert "problem: it \\x1b[2Jfailed\n  next: do this\n" in printed
    assert "all is well" not in printed


def test_a_missing_package_ends_the_examination(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lacking = [Finding("problem", "torch is not installed", "pip install torch")]
    monkeypatch.setattr("offsite.study.doctor.packages.examine_packages", lambda: ({"torch": "missing"}, {}, lacking))
    monkeypatch.setattr("offsite.study.doctor.machine.examine_machine", None)  # not reached
    assert main(["doctor", "--home", str(tmp_path / "home")]) == 1
    assert "pip install torch" in capsys.readouterr().out
