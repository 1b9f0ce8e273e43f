from pathlib import Path

import pytest

from offsite.cli import demo


def test_the_verdict_is_the_tables() -> None:
    good = demo._verdict({"zero-shot": 3.0, "emulator": 3.5, "plug-in": 2.5})
    assert good[0].startswith("The plug-in is 0.500 nats below zero-shot")
    assert good[1].startswith("The plug-in is 1.000 nats below emulator")
    bad = demo._verdict({"zero-shot": 3.0, "emulator": 2.0, "plug-in": 3.25, "full fine-tuning": 1.0})
    assert bad[0].startswith("The plug-in is NOT below (0.250 nats above) zero-shot")
    assert bad[1].startswith("The plug-in is NOT below (1.250 nats above) emulator")
    assert "every block but one" in bad[2]


@pytest.mark.parametrize(
    ("program", "shown"), [(".venv/bin/offsite", ".venv/bin/offsite"), ("x.py", "python -m offsite")]
)
def test_next_steps_can_be_pasted(program: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [program])
    text = demo._next_steps(Path("work"), Path("result.json"))
    assert f"  {shown} --home work/data-owner/home inspect work/data-owner/bundle\n" in text
    assert text.endswith("result.json")
    assert "numbers" not in demo._next_steps(Path("work"), None)


def test_no_sample_no_section() -> None:
    assert demo._sample({}) == []
