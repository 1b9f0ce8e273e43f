import csv
import json
import os
import re

import pytest

from offsite import extras
from offsite.data.row_files import data_digest
from offsite.data.rows import Row, Turn, choice_completion, parse_row, question_prompt, read_rows
from offsite.errors import DataError, UsageError

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, «you»\n"}]
RECORDS = {
    "text": [{"text": 'a, "b"\nc'}, {"text": "é"}],
    "prompt": [{"prompt": "", "completion": " b"}, {"prompt": "a\n\nb", "completion": "c"}],
    "messages": [{"messages": TURNS}, {"messages": [*TURNS, *TURNS]}],
    "choices": [{"question": "1 + 1?", "choices": ["1", "2"], "answer": 1}],
}


def jsonl(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def as_csv(file, records):
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(records[0]))
        writer.writeheader()
        for record in records:
            writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in record.items()})
    return file


def as_table(records):
    import pyarrow

    return pyarrow.Table.from_pylist(records) if isinstance(records, list) else records


def parquet(file, records):
    import pyarrow.parquet

    pyarrow.parquet.write_table(as_table(records), file)
    return file


def saved(folder, records, name="data-00000-of-00001.arrow", **state):
    """What datasets.save_to_disk leaves: Arrow streams, state.json and dataset_info.json."""
    import pyarrow

    folder.mkdir()
    table = as_table(records)
    with pyarrow.OSFile(str(folder / name), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}], "_split": "train", **state}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def reasons_of(file):
    with pytest.raises(DataError) as caught:
        read_rows(file)
    return caught.value.reasons


def test_every_kind_of_row(tmp_path):
    records = [record for kind in RECORDS.values() for record in kind]
    rows = read_rows(jsonl(tmp_path / "rows.jsonl", records))
    assert [row.line for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert rows[0] == Row(1, None, 'a, "b"\nc')
    assert rows[3] == Row(4, "a\n\nb", "c")
    assert rows[4].turns == (Turn("user", "Hi"), Turn("assistant", "Hello, «you»\n"))
    assert rows[6] == Row(7, "Question: 1 + 1?\nAnswer:", " 2", choices=(" 1", " 2"), answer=1)
    assert rows[6].prompt == question_prompt("1 + 1?")
    assert rows[6].completion == choice_completion("2")
    assert [row.whole_text for row in rows[3:7:3]] == ["a\n\nbc", "Question: 1 + 1?\nAnswer: 2"]
    assert rows[4].whole_text == "Hi\nHello, «you»\n"


@pytest.mark.parametrize("kind", RECORDS)
def test_every_format_says_the_same(tmp_path, kind):
    records = RECORDS[kind]
    expected = [(row.prompt, row.completion, row.choices, row.answer, row.turns) for row in _plain(tmp_path, records)]
    for file in (
        as_csv(tmp_path / "rows.csv", records),
        parquet(tmp_path / "rows.parquet", records),
        saved(tmp_path / "saved", records),
    ):
        rows = read_rows(file)
        assert [(row.prompt, row.completion, row.choices, row.answer, row.turns) for row in rows] == expected
    assert [row.line for row in rows] == list(range(1, len(records) + 1))


def _plain(folder, records):
    return read_rows(jsonl(folder / "rows.jsonl", records))


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"messages": "Hi"}, "field 'messages' is str, expected a list"),
        ({"messages": []}, "field 'messages' is a list of 0"),
        ({"messages": ["Hi"]}, "field 'messages[0]' has str, expected 'role' and 'content'"),
        ({"messages": [{"role": "user"}]}, "field 'messages[0]' has 'role', expected 'role' and 'content'"),
        ({"messages": [{**TURNS[0], "name": "x"}]}, "field 'messages[0]' has 'role', 'content', 'name'"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "field 'messages[0].role' is 'bot', expected system, user"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": ""}]}, "field 'messages[1].content' is empty"),
        ({"messages": [TURNS[0]]}, "no assistant turn"),
        (
            {"question": "q", "choices": ["a"], "answer": 0},
            "field 'choices' is a list of 1, expected a list of at least",
        ),
        ({"question": "q", "choices": ["a", 2], "answer": 0}, "field 'choices[1]' is int, expected a string"),
        ({"question": "q", "choices": ["a", ""], "answer": 0}, "field 'choices[1]' is empty"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "field 'answer' is 2, expected 0 to 1"),
        ({"question": "q", "choices": ["a", "b"], "answer": -1}, "field 'answer' is -1, expected 0 to 1"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "field 'answer' is bool"),
        ({"question": "", "choices": ["a", "b"], "answer": "b"}, "field 'question' is empty; field 'answer' is str"),
        ({"question": "q", "choices": ["a", "b"]}, "fields 'choices', 'question'; expected 'text'"),
    ],
)
def test_what_is_wrong_with_a_row(tmp_path, record, says):
    (reason,) = reasons_of(jsonl(tmp_path / "rows.jsonl", [{"text": "good"}, record]))
    assert reason.startswith(f"{tmp_path / 'rows.jsonl'}:2: ")
    assert says in reason


def test_other_columns_are_left_alone():
    assert parse_row({"prompt": "p", "completion": "c", "id": 7, "answers": ["a"]}, 1) == Row(1, "p", "c")


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_columns_of_a_table_that_are_not_looked_at_may_hold_anything(tmp_path, form):
    import pyarrow

    far = {
        "nanoseconds": pyarrow.array([1, 2], pyarrow.timestamp("ns")),
        "far": pyarrow.array([10**7, 2], pyarrow.date32()),
        "nowhere": pyarrow.array([1, 2], pyarrow.timestamp("us", tz="Mars/Olympus")),
    }
    make = saved if form == "saved" else parquet
    file = make(tmp_path / "rows.parquet", pyarrow.table({"text": ["a", "b"], **far}))
    assert [row.completion for row in read_rows(file)] == ["a", "b"]
    (reason, _) = reasons_of(make(tmp_path / "none.parquet", pyarrow.table(far)))
    assert "fields 'far', 'nanoseconds', 'nowhere'; expected 'text'" in reason
    with pytest.raises(DataError, match="cannot read the data set"):
        read_rows(make(tmp_path / "text.parquet", pyarrow.table({"text": far["far"]})))


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_a_table_with_two_columns_of_one_name(tmp_path, form):
    import pyarrow

    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    with pytest.raises(DataError, match="names a column twice"):
        read_rows((saved if form == "saved" else parquet)(tmp_path / "rows.parquet", table))


def test_a_long_cell_of_csv(tmp_path):
    (row,) = read_rows(as_csv(tmp_path / "rows.csv", [{"text": "word " * 40_000}]))
    assert len(row.completion) == 200_000


@pytest.mark.parametrize("name", ["rows.CSV", "rows.Txt", "rows.Parquet"])
def test_names_in_capitals_say_the_same(tmp_path, name):
    file = tmp_path / name
    if name == "rows.Parquet":
        parquet(file, [{"text": "a"}])
    else:
        file.write_text("text\na\n")
    (row,) = read_rows(file)
    assert row.document == (name == "rows.Txt")


def test_a_row_of_two_kinds_is_refused():
    assert "fields 'completion', 'prompt', 'text'" in parse_row({"prompt": "p", "completion": "c", "text": "t"}, 1)


def test_rows_of_a_table_are_named_by_their_number(tmp_path):
    records = [{"text": "a"}, {"text": None}, {"text": ""}]
    for file in (parquet(tmp_path / "rows.parquet", records), saved(tmp_path / "saved", records)):
        assert reasons_of(file) == (
            f"{file}:2: field 'text' is NoneType, expected a string",
            f"{file}:3: field 'text' is empty",
        )


def test_rows_of_csv_are_named_by_the_line_they_begin_on(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text('question,choices,answer\n"two\nlines","[""a"", ""b""]",0\n\nq,[1],0\nq,"[",0\nq,"[""a""]",b\n')
    lines = [reason.removeprefix(f"{file}:").partition(":")[0] for reason in reasons_of(file)]
    assert lines == ["5", "6", "7"]


def test_csv_that_is_none(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("text\na\nb,c\n")
    assert reasons_of(file) == (f"{file}:3: 2 cells, expected 1",)
    file.write_text('text\na\n"b\n')
    assert "rows.csv:3: not CSV" in reasons_of(file)[0]
    file.write_text("text,text\na,b\n")
    with pytest.raises(DataError, match="column twice"):
        read_rows(file)
    file.write_text("text\n")
    with pytest.raises(DataError, match="empty"):
        read_rows(file)
    file.write_bytes(b"text\n\xff\n")
    with pytest.raises(DataError, match="UTF-8 at byte 5"):
        read_rows(file)


def test_a_broken_parquet_file_or_folder(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(DataError, match="cannot read the data set"):
        read_rows(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="cannot read the data set"):
        read_rows(tmp_path / "none.parquet")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"without state.json"):
        read_rows(tmp_path / "folder")
    folder = saved(tmp_path / "saved", RECORDS["text"])
    (folder / "data-00000-of-00001.arrow").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match="cannot read"):
        read_rows(folder)


def test_a_saved_folder_reaches_no_file_outside(tmp_path):
    outside = saved(tmp_path / "outside", RECORDS["text"])
    folder = saved(tmp_path / "saved", RECORDS["text"], _data_files=[{"filename": f"../{outside.name}/x.arrow"}])
    with pytest.raises(DataError, match="does not list the files"):
        read_rows(folder)


def test_saved_splits_and_picked_rows_are_explained(tmp_path):
    both = tmp_path / "both"
    both.mkdir()
    (both / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for split in ("train", "test"):
        saved(both / split, RECORDS["text"])
    with pytest.raises(DataError, match="test, train"):
        read_rows(both)
    assert len(read_rows(both / "test")) == 2
    picked = saved(tmp_path / "picked", RECORDS["text"], _indices_files=[{"filename": "indices.arrow"}])
    with pytest.raises(DataError, match="flatten_indices"):
        read_rows(picked)


def test_plain_text_is_one_document(tmp_path):
    file = tmp_path / "book.txt"
    file.write_bytes("\ufeffOne\r\n\n  two\u2028 three \n".encode())
    assert read_rows(file) == [Row(1, None, "One\r\n\n  two\u2028 three \n", document=True)]
    file.write_text(" \n")
    with pytest.raises(DataError, match="empty"):
        read_rows(file)


@pytest.mark.parametrize("name", ["rows.parquet", "saved"])
def test_without_pyarrow_the_error_names_the_extra(tmp_path, monkeypatch, name):
    file = saved(tmp_path / name, RECORDS["text"]) if name == "saved" else parquet(tmp_path / name, RECORDS["text"])

    def missing(module):
        raise ModuleNotFoundError(f"No module named {module!r}")

    monkeypatch.setattr(extras.importlib, "import_module", missing)
    with pytest.raises(UsageError) as caught:
        read_rows(file)
    assert "pyarrow" in caught.value.reasons[0]
    assert "offsite-tuning[data]" in str(caught.value.next_step)


def test_what_can_be_read_once_has_no_digest(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        data_digest(tmp_path / "pipe")


def test_the_digest_of_a_folder_is_that_of_all_its_files(tmp_path):
    folder = saved(tmp_path / "saved", RECORDS["text"])
    before = data_digest(folder)
    assert data_digest(folder) == before
    arrow = folder / "data-00000-of-00001.arrow"
    content = arrow.read_bytes()
    arrow.write_bytes(content + b"\0")
    assert data_digest(folder) != before
    arrow.write_bytes(content)
    arrow.rename(folder / "other.arrow")
    assert data_digest(folder) != before


def test_what_is_wrong_with_every_row_is_told_once(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "a"}\n' * 300)
    with pytest.raises(DataError, match="300 bad rows") as caught:
        read_rows(file)
    first, more = caught.value.reasons
    assert first.startswith(f"{file}:1: fields 'question'")
    assert more == "and the same of 299 more"


def test_answers_of_csv_are_words_unless_there_are_choices(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("question,answer\nwho,me\n")
    with pytest.raises(DataError) as caught:
        read_rows(file)
    assert "fields 'answer', 'question'; expected" in caught.value.reasons[0]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("rows.csv", "prompt;completion\na;b\n", "separated by ';', expected commas"),
        ("rows.tsv", "prompt\tcompletion\na\tb\n", "a .tsv file, which is none that is read"),
        ("rows.xlsx", "PK", "a .xlsx file, which is none that is read"),
        ("rows.json", '[{"text": "a"}]', "one JSON list, expected an object on each line"),
    ],
)
def test_files_of_other_kinds_are_told_as_a_whole(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=re.escape(says)):
        read_rows(tmp_path / name)
