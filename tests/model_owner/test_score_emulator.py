"""The owner sees the emulator's loss beside the base's; only its own home knows it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from artifacts import packed
from offsite.cli import main
from offsite.config import PackSpec
from offsite.model_owner import score_emulator as scoring
from offsite.model_owner.base_model import open_base
from offsite.model_owner.calibration import calibration_batches as batches
from offsite.model_owner.calibration import scored_text as text
from offsite.model_owner.ledger import Ledger
from offsite.models.loading import load_model
from offsite.models.tokenizers import load_tokenizer
from offsite.protocol.artifacts import Base
from tiny import Parties, tiny_base, tiny_parties, tiny_vision_base


class House:
    def __init__(self, folder: Path) -> None:
        self.folder, self.parties = folder, tiny_parties(folder)
        self.base = tiny_base(folder / "base", blocks=4)
        (folder / "settings.toml").write_text('[pack]\ncompute = "fp32"\nthreads = 1\n')

    def pack(self, name: str, *words: object) -> int:
        usual = [self.base, "--out", self.folder / name, "--for", "hospital", "--home", self.parties.owner.folder]
        usual += ["--bottom", 1, "--top", 1, "--heal", "none", "--config", self.folder / "settings.toml", "--json"]
        return main(["pack", *(str(word) for word in (*usual, *words))])

    def inspect(self, name: str, home: Path, capsys: pytest.CaptureFixture[str]) -> Mapping[str, Any]:
        assert main(["inspect", str(self.folder / name), "--home", str(home), "--json"]) == 0
        shown: Mapping[str, Any] = json.loads(capsys.readouterr().out)
        return shown


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(tmp_path_factory.mktemp("house"))


def test_pack_and_inspect_show_the_loss_of_both_to_the_owner_alone(
    house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    assert house.pack("bundle", "--keep", 1, "--prune", 0.5, "--prune-by", "magnitude") == 0
    score = json.loads(capsys.readouterr().out)["emulator_score"]
    assert score["emulator_loss"] != score["base_loss"]
    assert score["difference"] == pytest.approx(score["emulator_loss"] - score["base_loss"])
    assert score["interval"]["low"] <= score["difference"] <= score["interval"]["high"]
    assert (score["fitted"], score["text"]) == (False, "the Python manual")
    assert house.inspect("bundle", house.parties.owner.folder, capsys)["emulator_score"] == score
    assert "emulator_score" not in house.inspect("bundle", house.parties.data_owner.folder, capsys)
    assert b"loss" not in b"".join(file.read_bytes() for file in (house.folder / "bundle").glob("offsite.json"))


def test_an_emulator_of_all_blocks_is_as_good_as_its_base(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is compressed; the base's loss is what its logits say of the same tokens."""
    passage = "The quick brown fox jumps over the lazy dog."
    monkeypatch.setattr(text, "_manual", lambda: [passage])
    assert house.pack("whole", "--keep", 2, "--dtype", "fp32") == 0
    score = json.loads(capsys.readouterr().out)["emulator_score"]
    assert score["emulator_loss"] == pytest.approx(score["base_loss"], rel=1e-6)
    assert score["interval"] == {"low": None, "high": None}  # of one sequence
    tokenizer = load_tokenizer(house.base)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(passage, add_special_tokens=False)["input_ids"]]])
    model = load_model(house.base, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert score["base_loss"] == pytest.approx(float(F.cross_entropy(logits[0, :-1], ids[0, 1:])), rel=1e-5)
    assert score["tokens"] == ids.shape[1] - 1


def test_sequences_are_spread_over_the_passages() -> None:
    found = scoring._sequences(7, [range(3000), range(5000, 8000)], 64)
    assert 0.9 * scoring.SCORED_TOKENS <= sum(len(one.ids) for one in found) <= scoring.SCORED_TOKENS
    assert all(one.ids[0] == 7 and one.given == 1 for one in found)
    assert sum(one.ids[1] >= 5000 for one in found) == len(found) // 2


def test_scoring_can_be_left_out(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    assert house.pack("unscored", "--keep", 1, "--no-score") == 0
    assert "emulator_score" not in json.loads(capsys.readouterr().out)
    assert "emulator_score" not in house.inspect("unscored", house.parties.owner.folder, capsys)


def test_a_failure_to_score_costs_no_bundle(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scoring, "available_memory", lambda _: 1000)
    assert house.pack("large", "--keep", 1) == 0
    captured = capsys.readouterr()
    assert "emulator_score" not in json.loads(captured.out)
    assert "note: base and emulator were not scored" in captured.err
    assert (house.folder / "large" / "offsite.json").exists()


@pytest.mark.parametrize(
    ("characters", "fits", "fitted", "says"),
    [(40_000, True, False, "between the sequences"), (1_500, True, True, "own.txt"), (1_500, False, False, "own.txt")],
)
def test_text_of_the_owners_is_scored_where_nothing_was_fitted(
    house: House, tmp_path: Path, characters: int, fits: bool, fitted: bool, says: str
) -> None:
    """What lies between the sequences of calibration has none of their tokens."""
    file = tmp_path / "own.txt"
    file.write_text("".join(f"{number} " for number in range(characters // 5))[:characters])
    model, tokenizer = open_base(Base(house.base)), load_tokenizer(house.base)
    spec = PackSpec(calibration=file, calibration_tokens=1024)
    found = text.scored_text(model, spec, tokenizer, fits=fits, distills=False)
    assert found.fitted is fitted
    assert says in found.name
    if says != "between the sequences":
        return
    ids = tokenizer(file.read_text(), add_special_tokens=False)["input_ids"]
    taken = [row[1:].tolist() for batch in batches.calibration_batches(model, file, 1024) for row in batch]
    assert sum(map(len, found.passages)) + sum(map(len, taken)) == len(ids)
    assert sorted(token for part in (*found.passages, *taken) for token in part) == sorted(ids)


def test_an_encoder_has_no_loss(tmp_path: Path, parties: Parties) -> None:
    base = tiny_vision_base(tmp_path / "base")
    bundle = packed(base, tmp_path / "bundle", parties)
    assert scoring.score_emulator(Base(base), bundle, PackSpec(), parties.owner) is None
    issued = Ledger(parties.owner.ledger).issued(bundle.digest)
    assert issued is not None
    assert issued.score is None
