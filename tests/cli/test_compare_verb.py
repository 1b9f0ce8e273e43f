import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from artifacts import lora_return, packed
from offsite.cli import main
from offsite.config import PlugInSpec
from offsite.model_owner.intake import intake
from offsite.model_owner.plugging_in.plug_in import plug_in
from offsite.protocol.artifacts import Base
from tiny import Parties, tiny_base, tiny_parties, tiny_pictures, tiny_rows, tiny_vision_base

ROWS = 8


class World:
    """A base, another base, a bundle, a return and a plug-in, and rows with a question."""

    def __init__(self, folder: Path) -> None:
        self.parties: Parties = tiny_parties(folder)
        self.base, self.other = tiny_base(folder / "base", blocks=3), tiny_base(folder / "other", blocks=3, seed=1)
        self.bundle = packed(self.base, folder / "bundle", self.parties)
        self.returned = lora_return(self.bundle, folder / "return", self.parties.data_owner)
        self.plugged = folder / "plugged"
        taken = intake(folder / "return", self.parties.owner)
        plug_in(Base(self.base), taken, self.plugged, PlugInSpec(), self.parties.owner)
        self.rows = tiny_rows(folder / "rows.jsonl", ROWS)
        question = {"question": "The SECRET fox?", "choices": ["jumps", "sleeps"], "answer": 0}
        self.rows.write_text(self.rows.read_text() + json.dumps(question) + "\n")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("compare"))


def compared(world: World, capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    command = ["compare", *words, "--data", world.rows, "--home", world.parties.owner.folder, "--json"]
    assert main([str(word) for word in command]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_each_model_against_the_first(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    found = compared(world, capsys, world.base, world.plugged, world.base, world.bundle.folder, "--rows", "3")
    names = [str(world.base), str(world.plugged), str(world.base), str(world.bundle.folder)]
    assert [model["name"] for model in found["models"]] == names
    assert found["against"] == str(world.base)
    zero, plugged = (model["loss"] for model in found["models"][:2])
    by_name = {(one["name"], one["metric"]): one for one in found["differences"]}
    assert by_name[str(world.plugged), "loss"]["value"] == pytest.approx(plugged - zero)
    assert by_name[str(world.plugged), "loss"]["value"] != 0  # the adapter was on the base
    assert by_name[str(world.base), "loss"]["verdict"] == "equal"
    assert by_name[str(world.plugged), "accuracy"]["verdict"] in ("too few rows", "equal")  # of a single question
    largest = [row for row in found["rows"] if row["name"] == str(world.plugged)]
    assert len(largest) == 3
    assert [abs(row["nats"]) for row in largest] == sorted((abs(row["nats"]) for row in largest), reverse=True)
    assert not any("text" in row for row in found["rows"])


def test_eval_says_the_same(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", world.rows, "--home", world.parties.data_owner.folder, "--json"]
    tuned = [world.bundle.folder, world.returned.folder]
    assert main([str(word) for word in ["compare", *tuned, *words]]) == 0
    model = json.loads(capsys.readouterr().out)["models"][1]
    assert main([str(word) for word in ["eval", tuned[0], "--adapter", tuned[1], *words]]) == 0
    score = json.loads(capsys.readouterr().out)
    assert [model[name] for name in ("loss", "accuracy", "rows")] == [
        score[name] for name in ("loss", "accuracy", "rows")
    ]
    assert model["intervals"]["loss"] == score["intervals"]["loss"]


def test_text_of_rows_only_if_it_is_asked_for(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", world.base, world.other, "--data", world.rows, "--rows", "9"]
    assert main([str(word) for word in words]) == 0
    printed = capsys.readouterr()
    assert f"against {world.base}:" in printed.out
    assert "row 9 " in printed.out
    assert "SECRET" not in printed.out + printed.err
    assert main([str(word) for word in [*words, "--show-rows"]]) == 0
    assert "| " in (shown := capsys.readouterr().out)
    assert "SECRET fox" in shown


def test_what_is_not_genuine_is_not_compared(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offsite.evaluation.compare.evaluate", None)  # not reached
    folder = shutil.copytree(world.bundle.folder, tmp_path / "bundle")
    (folder / "config.json").write_text("{}")
    words = ["compare", world.base, folder, "--data", world.rows, "--home", world.parties.data_owner.folder]
    assert main([str(word) for word in words]) == 3
    words = ["compare", world.other, world.plugged, "--data", world.rows, "--home", world.parties.owner.folder]
    assert main([str(word) for word in words]) == 4
    assert "another base" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["base"], "nothing to compare"),
        (["plugged", "base"], "no model is named before it"),
        (["base", "other", "--probe", "."], "nothing to probe"),
        (["base", "other", "--rows", "-1"], "--rows"),
    ],
)
def test_wrong_words_are_usage_errors(
    words: list[str], says: str, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world.base.parent)
    monkeypatch.setattr("offsite.evaluation.compare.evaluate", None)  # not reached
    assert main(["compare", *words, "--data", "rows.jsonl", "--home", "acme-home"]) == 2
    assert says in capsys.readouterr().err


def test_a_tokenizer_of_other_tokens_is_told(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from offsite.study.demos.tiny_base import tiny_base as byte_base

    letters = byte_base(tmp_path / "letters", "llama", 2).folder  # a token for each byte
    assert not compared(world, capsys, world.base, letters)["same_tokens"]
    assert main(["compare", str(world.base), str(letters), "--data", str(world.rows)]) == 0
    assert "the tokenizers differ" in capsys.readouterr().out


def test_models_of_pictures(tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("PIL")
    pictures = tiny_pictures(tmp_path / "pictures", 4)
    for name in ("blue", "green", "red"):
        (tmp_path / "pictures" / name).rename(tmp_path / "pictures" / f"SECRET-{name}")
    encoder = tiny_vision_base(tmp_path / "encoder", "vit", 2)
    other = tiny_vision_base(tmp_path / "other", "vit", 2, seed=1)
    words = ["compare", encoder, other, "--data", pictures, "--probe", pictures, "--rows", "2", "--json"]
    assert main([str(word) for word in words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {one["metric"] for one in found["differences"]} == {"loss", "accuracy"}
    assert len(found["rows"]) == 2
    assert main(["compare", str(encoder), str(world.base), "--data", str(pictures)]) == 2
    assert "cannot be compared" in capsys.readouterr().err
