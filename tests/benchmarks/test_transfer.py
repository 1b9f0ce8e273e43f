"""The rank correlations of a study's bundles, over a study that was played in small."""

from pathlib import Path

import pytest
import torch

from benchmarks import transfer
from studies import RECIPE, lay_out, played_study

THREE = RECIPE.replace(RECIPE[RECIPE.index('[[data]]\nname = "choices"') : RECIPE.index("[[pack]]")], "").replace(
    "[[tune]]",
    '[[pack]]\nname = "whole"\nbottom = 1\ntop = 1\nkeep = 4\nheal = "none"\n\n'
    '[[pack]]\nname = "narrow"\nplacement = "every"\nnarrow = 0.5\nheal = "none"\ncalibration_tokens = 256\n\n[[tune]]',
)


def test_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = lay_out(tmp_path, THREE)
    played_study(recipe)
    words = [
        str(recipe),
        str(tmp_path / "out"),
        str(tmp_path / "train.jsonl"),
        "--result",
        str(tmp_path / "found.json"),
    ]
    monkeypatch.setattr("sys.argv", ["transfer", *words])
    transfer.main()
    lines = capsys.readouterr().out.splitlines()
    whole = next(line for line in lines if line.startswith("| whole |"))
    assert whole.startswith("| whole | 1.000 |")
    assert sum(line.startswith("| cosine |") for line in lines) == 2
    assert (tmp_path / "found.json").exists()


def test_correlation_is_spearmans() -> None:
    cells = [
        {"dataset": "one", "compress": name, "seed": 0, "gain_recovered": gain, "own_gain": None}
        for name, gain in (("a", 0.9), ("b", 0.5), ("c", 0.7))
    ]
    bundles = {"a": {"cosine": 0.8, "emulator_loss": 1.0}, "b": {"cosine": 0.1, "emulator_loss": 2.0}}
    bundles["c"] = {"cosine": 0.2, "emulator_loss": 3.0}
    result = {"bundles": bundles, "cells": cells}
    assert transfer.correlation(result, "one", "cosine", "gain_recovered") == pytest.approx(1)
    assert transfer.correlation(result, "one", "emulator_loss", "gain_recovered") == pytest.approx(-0.5)
    assert torch.isnan(torch.tensor(transfer.correlation(result, "one", "cosine", "own_gain")))
