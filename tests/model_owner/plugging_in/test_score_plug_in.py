"""`plug-in --eval-data`: base and plug-in on the owner's rows, compared row by row, with warnings."""

import json
from pathlib import Path
from typing import Any

import pytest

from artifacts import lora_return, packed
from offsite.cli import main, show_transfer
from offsite.config import EvalSpec
from offsite.evaluation.evaluate import evaluate
from offsite.evaluation.intervals import Interval, paired_interval
from offsite.model_owner.ledger import Ledger
from offsite.model_owner.plugging_in.score_plug_in import Comparison, Transfer
from offsite.protocol.verify import verify_return
from tiny import Parties, tiny_base, tiny_parties, tiny_rows, tiny_vision_base

SPEC = EvalSpec(compute="fp32", device="cpu", threads=1)


class House:
    """A base, its bundle, rows, and returns; the settings file computes in fp32."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.parties = folder, tiny_parties(folder)
        self.base, self.rows = tiny_base(folder / "base", blocks=3), tiny_rows(folder / "rows.jsonl", 6)
        self.bundle = packed(self.base, folder / "bundle", self.parties)
        (folder / "settings.toml").write_text('[eval]\ncompute = "fp32"\ndevice = "cpu"\nthreads = 1\n')

    def returned(self, name: str, b: float, seed: int = 0) -> Path:
        return lora_return(self.bundle, self.folder / name, self.parties.data_owner, b=b, seed=seed).folder

    def plug_in(self, returned: Path, *words: object) -> int:
        usual: list[object]
        out = returned.with_name(f"plugged-{returned.name}")
        usual = [self.base, returned, "--out", out, "--home", self.parties.owner.folder]
        return main(
            ["plug-in", *(str(w) for w in (*usual, "--config", self.folder / "settings.toml", "--again", *words))]
        )


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(tmp_path_factory.mktemp("house"))


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_both_are_scored_and_compared_row_by_row(house: House, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    returned = house.returned(form, b=0.3)
    assert house.plug_in(returned, "--as", form, "--eval-data", house.rows, "--json") == 0
    shown = json.loads(capsys.readouterr().out)["transfer"]
    out = returned.with_name(f"plugged-{form}")
    before = evaluate(house.base, house.rows, SPEC)
    after = (
        evaluate(house.base, house.rows, SPEC, adapter=out) if form == "adapter" else evaluate(out, house.rows, SPEC)
    )
    [one] = shown["comparisons"]
    assert (one["base"], one["plug_in"]) == (pytest.approx(before.loss), pytest.approx(after.loss))
    assert one["difference"] == pytest.approx(after.loss - before.loss)
    nats = [[row.nats for row in score.row_losses] for score in (after, before)]
    ends = paired_interval(*nats, [float(row.tokens) for row in after.row_losses])
    assert ends is not None
    assert (one["interval"]["low"], one["interval"]["high"]) == (pytest.approx(ends.low), pytest.approx(ends.high))
    assert (shown["rows"], shown["tokens"]) == (after.rows, after.tokens)


@pytest.mark.parametrize(
    ("metric", "difference", "verdict", "says"),
    [
        ("loss", 0.2, "worse", "NOT better than the base by its loss"),
        ("accuracy", -0.2, "noise", "NOT better than the base by its accuracy"),
        ("loss", 0.0, "equal", "NOT better"),
        ("loss", -0.2, "noise", "do not show that the plug-in is better by its loss"),
        ("accuracy_norm", 0.2, "too few rows", "do not show that the plug-in is better by its accuracy norm"),
        ("loss", -0.2, "better", None),
        ("accuracy", 0.2, "better", None),
    ],
)
def test_what_is_warned_of(metric: Any, difference: float, verdict: Any, says: str | None) -> None:
    one = Comparison(metric, 1.0, 1.0 + difference, difference, Interval(-1, 1), verdict)
    found = show_transfer.warnings(Transfer(5, 50, (one,)))
    assert (len(found) == 1 and says in found[0]) if says else found == []


def test_a_person_gets_a_table_and_a_warning(house: House, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One row says nothing of how rows vary, so the plug-in is not certainly better, whatever its loss."""
    row = tiny_rows(tmp_path / "one.jsonl", 1)
    assert house.plug_in(house.returned("person", b=0.3, seed=7), "--eval-data", row) == 0
    printed = capsys.readouterr()
    assert "offsite: warning: " in printed.err
    *_, head, loss, rows = printed.out.rstrip().splitlines()
    assert head.split()[:3] == ["base", "plug-in", "difference"]
    assert loss.startswith("loss, nats per token")
    assert rows.startswith("on 1 rows")


def test_accuracy_is_compared_where_rows_are_questions(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    rows = house.folder / "questions.jsonl"
    row: dict[str, Any] = {"question": "Which?", "choices": ["fox", "dog"], "answer": 0}
    rows.write_text("".join(json.dumps(row) + "\n" for _ in range(3)))
    assert house.plug_in(house.returned("asked", b=0.3), "--eval-data", rows, "--json") == 0
    shown = json.loads(capsys.readouterr().out)["transfer"]["comparisons"]
    assert [one["metric"] for one in shown] == ["loss", "accuracy", "accuracy_norm"]


def test_rows_that_chose_the_plug_in_are_said_to_flatter(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--choose-on", house.rows, "--strength", "0.5", "--eval-data", house.rows)
    assert house.plug_in(house.returned("both", b=0.3), *words) == 0
    assert "they flatter it" in capsys.readouterr().err


def test_bad_rows_are_found_before_anything_is_plugged_in(
    house: House, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": 1}\n')
    returned = house.returned("bad", b=0.3, seed=9)
    assert house.plug_in(returned, "--eval-data", bad) == 2
    assert not returned.with_name("plugged-bad").exists()
    ledger, verified = Ledger(house.parties.owner.ledger), verify_return(returned, house.parties.owner)
    assert ledger.plugged_in(verified) == []
    assert "1 bad row" in capsys.readouterr().err


def test_a_return_that_was_plugged_in_before_is_refused_before_it_is_scored(
    house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    returned = house.returned("twice", b=0.3, seed=8)
    assert house.plug_in(returned) == 0
    out = house.folder / "twice-out"
    words = ["plug-in", house.base, returned, "--out", out, "--home", house.parties.owner.folder]
    assert main([str(word) for word in (*words, "--eval-data", house.rows)]) == 5
    err = capsys.readouterr().err
    assert "plugged in before" in err
    assert "scoring" not in err


def test_an_encoder_has_nothing_to_compare(tmp_path: Path, parties: Parties) -> None:
    from offsite.errors import UsageError
    from offsite.model_owner.plugging_in.score_plug_in import score_base
    from offsite.protocol.artifacts import Base

    base = tiny_vision_base(tmp_path / "base")
    with pytest.raises(UsageError, match="--eval-data is for language models"):
        score_base(Base(base), tmp_path / "rows", SPEC)
