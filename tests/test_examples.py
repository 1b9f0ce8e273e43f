"""The scripts in examples/ run as they are, and come out as they say."""

import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    return runpy.run_path(str(EXAMPLES / name))


def test_the_whole_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    names = run("whole_chain.py", tmp_path, monkeypatch)
    (difference,) = names["found"].differences
    assert (difference.metric, difference.verdict) == ("loss", "better")
    assert difference.value < -0.1
    assert "plug-in: " in capsys.readouterr().out


@pytest.mark.every_form
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_many_adapters_on_one_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each adapter is best at its own answer, and a row of a mixed batch has the logits of its adapter."""
    import torch

    names = run("many_adapters.py", tmp_path, monkeypatch)
    losses = names["losses"]
    for name, answer, other in (("hospital", " yes, doctor", "clinic"), ("clinic", " no, nurse", "hospital")):
        assert losses[name, answer] < losses["base", answer]
        assert losses[name, answer] < losses[other, answer]
    model, prompts, logits = names["model"], names["prompts"], names["logits"]
    one = {key: value[:1] for key, value in prompts.items()}
    with torch.no_grad():
        for row, name in enumerate(("hospital", "clinic")):
            model.set_adapter(name)
            torch.testing.assert_close(model(**one).logits[0, -1], logits[row], rtol=1e-4, atol=1e-4)


def test_every_example_is_run_here() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{file.name}"' in text for file in EXAMPLES.glob("*.py"))
