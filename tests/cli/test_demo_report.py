from pathlib import Path

import pytest

from offsite.cli import demo
from offsite.cli.show_gains import gain_sentences
from offsite.evaluation.row_scores import MetricName
from offsite.study.demos.gains import gains_over_zero_shot

SENT = {"verbatim": 0.625, "compressed": 0.25, "not_sent": 0.125}


def sentences(metric: MetricName, **scores: float) -> list[str]:
    names = {"zero_shot": "zero-shot", "plug_in": "plug-in", "full": "full fine-tuning"}
    rows = {names.get(name, name): score for name, score in scores.items()}
    return gain_sentences(gains_over_zero_shot(rows, metric), SENT, metric, "add --full")


def test_gaps_are_the_tables() -> None:
    good = sentences("loss", zero_shot=3.0, emulator=2.75, plug_in=2.5)
    assert good[0].startswith("The plug-in is 0.500 nats below zero-shot")
    assert good[1].startswith("The tuned emulator is 0.250 nats below zero-shot")
    assert good[2].startswith("The plug-in is 0.250 nats below the tuned emulator")
    bad = sentences("loss", zero_shot=3.0, emulator=2.0, plug_in=3.25)
    assert bad[0].startswith("The plug-in is NOT below (0.250 nats above) zero-shot")
    assert bad[2].startswith("The plug-in is NOT below (1.250 nats above) the tuned emulator")
    pictures = sentences("accuracy", zero_shot=0.5, emulator=0.625, plug_in=0.75)
    assert pictures[0].startswith("The plug-in is 25.0 points above zero-shot")
    assert pictures[1].startswith("The tuned emulator is 12.5 points above zero-shot")
    assert sentences("accuracy", zero_shot=0.5, emulator=0.5, plug_in=0.25)[0].startswith(
        "The plug-in is NOT above (25.0 points below) zero-shot"
    )


def test_shares_of_a_gain_that_was_not_measured_are_not_given() -> None:
    lines = sentences("loss", zero_shot=3.0, emulator=2.75, plug_in=2.5)
    assert lines[3] == "Full fine-tuning was not run, so no share of its gain is known: add --full."
    assert not any("%" in line for line in lines[:-1])
    nothing = sentences("loss", zero_shot=3.0, emulator=2.75, plug_in=2.5, full=3.0)
    assert nothing[3].startswith("Full fine-tuning did not gain over zero-shot")
    assert not any("%" in line for line in nothing[:-1])


def test_shares_of_full_fine_tunings_gain() -> None:
    lines = sentences("loss", zero_shot=3.0, emulator=2.75, plug_in=2.5, full=2.0)
    assert lines[3:5] == [
        "Gain recovered: the plug-in has 50 % of full fine-tuning's gain.",
        "Emulator's own gain: the tuned emulator has 25 % of it.",
    ]
    assert lines[5] == (
        "Of the base's parameters, the bundle holds 62.5 % verbatim and 25.0 % compressed; 12.5 % were not sent."
    )


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
