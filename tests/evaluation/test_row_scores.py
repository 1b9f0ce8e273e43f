import json
from pathlib import Path

import pytest

from offsite.cli import main
from offsite.errors import StorageError
from offsite.evaluation.intervals import paired_interval
from offsite.evaluation.row_scores import RowScores, difference, read_row_scores
from tiny import tiny_base, tiny_rows


def test_eval_writes_what_adds_up_to_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, rows = tiny_base(tmp_path / "base"), tiny_rows(tmp_path / "rows.jsonl", 5)
    asked = {"question": "Which?", "choices": ["this", "that"], "answer": 1}
    rows.write_text(rows.read_text() + json.dumps(asked) + "\n")
    file = tmp_path / "scores" / "rows.jsonl"
    assert main(["eval", str(base), "--data", str(rows), "--row-scores", str(file), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    scores = read_row_scores(file)
    assert scores.loss == pytest.approx(result["loss"])
    assert scores.lines == (1, 2, 3, 4, 5, 6)
    assert sum(scores.tokens) == result["tokens"]
    assert scores.right == (result["accuracy"],)
    assert "quick" not in file.read_text()


def test_differences_are_paired() -> None:
    one = RowScores((1, 2, 3), (1.0, 5.0, 9.0), (1.0, 2.0, 3.0), (), ())
    other = RowScores((1, 2, 3), (2.0, 7.0, 12.0), (1.0, 2.0, 3.0), (), ())
    value, ends = difference(one, other)
    assert value == -1.0
    assert ends == paired_interval(one.nats, other.nats, one.tokens)
    with pytest.raises(ValueError, match="different rows"):
        difference(one, RowScores((1, 2, 4), (2.0, 7.0, 12.0), (1.0, 2.0, 3.0), (), ()))


@pytest.mark.parametrize("content", ["{", '{"nats": 1}\n', "[]\n"])
def test_a_damaged_file_is_an_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "rows").write_text(content)
    with pytest.raises(StorageError, match="cannot read the row scores"):
        read_row_scores(tmp_path / "rows")


def test_of_several_data_sets_each_row_names_its_file(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", blocks=2)
    one, two = tiny_rows(tmp_path / "one.jsonl", 2), tiny_rows(tmp_path / "two.jsonl", 3)
    asked = {"question": "Which?", "choices": ["this", "that"], "answer": 1}
    two.write_text(two.read_text() + json.dumps(asked) + "\n")
    file = tmp_path / "scores.jsonl"
    words = ["eval", str(base), "--data", str(one), "--row-scores", str(file)]
    assert main([*words, "--data", str(two)]) == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    places = [(Path(line["file"]).name, line["line"]) for line in lines]
    assert places == [*(("one.jsonl", n) for n in (1, 2)), *(("two.jsonl", n) for n in (1, 2, 3, 4)), ("two.jsonl", 4)]
    both = read_row_scores(file)
    assert both.files == ("one.jsonl", "one.jsonl", *["two.jsonl"] * 4)
    other = RowScores(both.lines, both.nats, both.tokens, both.right, both.right_by_length, files=both.files[::-1])
    with pytest.raises(ValueError, match="different rows"):
        difference(both, other)
    assert main(words) == 0
    assert all("file" not in line for line in file.read_text().splitlines())  # of one file it is clear
