"""`--check`, and which data the verbs take."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from chat_templates import FAMILIES
from offsite.cli import main
from tiny import tiny_base, tiny_bundle, tiny_parties, tiny_pictures, tiny_rows, tiny_vision_base


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A folder with a base and a bundle that writes conversations as Qwen 3 does, and the parties."""
    folder = tmp_path_factory.mktemp("house")
    parties = tiny_parties(folder)
    template, special = FAMILIES["qwen3"]
    base = tiny_base(folder / "base", blocks=3, vocab_size=340, max_position_embeddings=128)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(base)
    tiny_bundle(base, folder / "bundle", parties, keep=1)
    return folder, parties


@pytest.fixture
def tune(house):
    folder, parties = house

    def run(*words):
        return main(["tune", str(folder / "bundle"), "--home", str(parties.data_owner.folder), *map(str, words)])

    return run


def lines(file, *records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


CHAT = [
    {"role": "user", "content": "who?"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nfox"},
    {"role": "user", "content": "so?"},
    {"role": "assistant", "content": "dog"},
]
TEXT = {"text": "The quick brown fox"}


def test_a_check_shows_what_becomes_of_the_rows(tune, tmp_path, capsys):
    file = lines(tmp_path / "rows.jsonl", {"messages": CHAT}, {"prompt": "who?", "completion": " fox"}, TEXT)
    assert tune("--data", file, "--check") == 0
    out = capsys.readouterr().out
    assert f"{file}:1: " in out
    said = "⟦fox<|im_end|>⟧\n<|im_start|>user\nso?<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\ndog"
    assert said.replace("\n", "\n  | ") in out  # so that no text looks like a line of the program
    assert "<s>who?⟦ fox</s>⟧" in out
    assert "<s>⟦The quick brown fox</s>⟧" in out
    assert "left out by the chat template  reasoning (1)" in out
    assert not list(tmp_path.glob("return*"))


def test_a_check_as_json(tune, tmp_path, capsys):
    file = lines(tmp_path / "rows.jsonl", {"messages": CHAT}, *[TEXT] * 4)
    held_out = lines(tmp_path / "test.jsonl", TEXT)
    assert tune("--data", file, "--eval-data", held_out, "--check", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "check"
    data = found["data"]
    assert (data["rows"], data["used"], data["left_out"], data["cut"], data["too_long"]) == (5, 5, 0, 0, 0)
    assert data["dropped"] == {"reasoning": 1}
    assert data["max_length"] == 128
    assert data["lengths"]["shortest"] <= data["lengths"]["median"] <= data["lengths"]["longest"] <= 128
    assert [row["place"] for row in data["shown"]] == [f"{file}:{line}" for line in (1, 3, 5)]
    first = data["shown"][0]
    assert "".join(piece["text"] for piece in first["pieces"] if piece["learnt"]).startswith("fox<|im_end|>")
    assert first["learnt"] < first["tokens"]
    assert found["eval_data"]["rows"] == 1


@pytest.mark.parametrize(
    ("long_rows", "code", "cut", "left_out"), [("error", 2, 0, 1), ("skip", 0, 0, 1), ("truncate", 0, 1, 0)]
)
def test_a_check_counts_rows_that_are_too_long(tune, tmp_path, capsys, long_rows, code, cut, left_out):
    file = lines(tmp_path / "rows.jsonl", TEXT, {"text": "fox " * 200})
    (tmp_path / "set.toml").write_text(f'[tune]\nlong_rows = "{long_rows}"\n')
    assert tune("--data", file, "--check", "--json", "--config", tmp_path / "set.toml") == code
    captured = capsys.readouterr()
    data = json.loads(captured.out)["data"]
    assert (data["too_long"], data["cut"], data["left_out"], data["refused"]) == (1, cut, left_out, code == 2)
    assert ("a run would refuse them" in captured.err) == (code == 2)


def test_a_check_refuses_bad_rows_as_the_run_does(tune, tmp_path, capsys):
    file = lines(tmp_path / "rows.jsonl", TEXT, {"txt": "a"})
    assert tune("--data", file, "--check") == 2
    assert f"{file}:2: fields 'txt'" in capsys.readouterr().err


def test_what_is_learnt_is_in_colour_on_a_terminal(house, tmp_path):
    folder, _ = house
    file = lines(tmp_path / "rows.jsonl", {"prompt": "who?", "completion": " fox"})
    words = [sys.executable, "-m", "offsite", "eval", str(folder / "base"), "--data", str(file), "--check"]
    reader, writer = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    subprocess.run(words, stdout=writer, stderr=subprocess.DEVNULL, check=True, env=environment, timeout=120)
    os.close(writer)
    shown = b""
    while True:
        try:
            part = os.read(reader, 1 << 16)
        except OSError:
            break
        if not part:
            break
        shown += part
    os.close(reader)
    assert b"<s>who?\x1b[32m\x1b[1m fox</s>\x1b[0m" in shown


def test_a_check_of_an_evaluation(house, tmp_path, capsys):
    question = {"question": "who?", "choices": ["fox", "dog"], "answer": 1}
    file = lines(tmp_path / "rows.jsonl", question, {"messages": CHAT[:2]})
    assert main(["eval", str(house[0] / "base"), "--data", str(file), "--check", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)["data"]
    assert (data["rows"], data["questions"]) == (2, 1)
    assert main(["eval", str(house[0] / "base"), "--tasks", "x", "--check"]) == 2
    assert "--check is about rows" in capsys.readouterr().err


def test_a_check_of_pictures(tmp_path, capsys):
    base = tiny_vision_base(tmp_path / "base")
    tiny_pictures(tmp_path / "set" / "Train", 2)
    tiny_pictures(tmp_path / "set" / "Test", 1)
    assert main(["eval", str(base), "--data", str(tmp_path / "set"), "--check"]) == 0
    out = capsys.readouterr().out
    assert "blue (1), green (1), red (1)" in out
    assert "Test/blue/0.png: blue, " in out
    assert main(["eval", str(base), "--data", str(tmp_path / "set"), "--check", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)["data"]
    assert (data["pictures"], data["left_out"], data["classes"]) == (3, 0, {"blue": 1, "green": 1, "red": 1})


def test_several_data_sets_are_joined(tune, tmp_path, capsys):
    one, other = lines(tmp_path / "a.jsonl", TEXT), lines(tmp_path / "b.jsonl", TEXT, TEXT)
    assert tune("--data", one, "--data", other, "--eval-data", one, "--eval-data", other, "--check", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [found[name]["rows"] for name in ("data", "eval_data")] == [3, 3]


def test_columns_and_chosen_answers(tune, tmp_path, capsys):
    file = lines(tmp_path / "rows.jsonl", {"question": "who?", "answer": " fox", "chosen": " fox", "rejected": " dog"})
    assert tune("--data", file, "--check") == 2
    assert "--chosen takes the chosen answers" in capsys.readouterr().err
    assert tune("--data", file, "--check", "--columns", "prompt=question,completion=answer") == 0
    assert "<s>who?⟦ fox</s>⟧" in capsys.readouterr().out
    assert tune("--data", file, "--check", "--columns", "prompt=question", "--chosen") == 0
    assert "<s>who?⟦ fox</s>⟧" in capsys.readouterr().out
    (tmp_path / "set.toml").write_text('[tune]\ncolumns = {prompt = "question", completion = "answer"}\n')
    assert tune("--data", file, "--check", "--config", tmp_path / "set.toml") == 0
    for wrong, says in (("prompt", "expected FIELD=COLUMN"), ("promt=question", "no field is called promt")):
        capsys.readouterr()
        assert tune("--data", file, "--check", "--columns", wrong) == 2
        assert says in capsys.readouterr().err


def test_tuning_and_scoring_take_joined_sets_and_columns(house, tune, tmp_path, capsys):
    one = tiny_rows(tmp_path / "a.jsonl", 4)
    other = lines(tmp_path / "b.jsonl", {"prompt": "who?", "completion": " fox"})
    out = tmp_path / "return"
    assert tune("--data", one, "--data", other, "--out", out, "--epochs", "1", "--rank", "2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["tuning"]["steps"] == 1
    row_scores = tmp_path / "scores.jsonl"
    words = ["eval", str(house[0] / "base"), "--data", str(one), "--data", str(other), "--row-scores", str(row_scores)]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 5
    assert main([*words[:-1], str(one), "--json"]) == 2
    assert "holds the rows themselves" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [("--out", "a", "--out", "b"), ("--out=a", "--rank", "2", "--rank=4"), ("--out", "a", "--json", "--json"),
     ("--out", "a", "--chosen", "--no-chosen")],
)  # fmt: skip
def test_an_option_that_is_given_twice_is_refused(tune, tmp_path, capsys, words):
    assert tune("--data", lines(tmp_path / "rows.jsonl", TEXT), *words) == 2
    assert "was given twice" in capsys.readouterr().err
    assert not Path("a").exists()


@pytest.mark.parametrize("other", ["--plan", "--resume"])
def test_a_check_goes_with_no_other_thing_to_do(tune, tmp_path, capsys, other):
    assert tune("--data", lines(tmp_path / "rows.jsonl", TEXT), "--out", tmp_path / "return", "--check", other) == 2
    assert "--check was given with" in capsys.readouterr().err


def test_a_run_without_a_folder_for_its_return(tune, tmp_path, capsys):
    assert tune("--data", lines(tmp_path / "rows.jsonl", TEXT)) == 2
    assert "--out return/" in capsys.readouterr().err
