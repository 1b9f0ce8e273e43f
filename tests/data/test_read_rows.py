# ruff: noqa: E501 - a record stands in one line
import csv
import json
import os
import re

import pytest

from offsite import extras
from offsite.data.conversations.parse_messages import Turn
from offsite.data.data_files import data_digest
from offsite.data.parse_row import choice_completion, parse_row, question_prompt
from offsite.data.read_rows import read_rows
from offsite.data.row import Row, RowForm
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
        ({"messages": [{**TURNS[0], "name": "x"}]}, "field 'messages' has no assistant turn"),
        (
            {"messages": [{"role": "asistant", "content": "x"}]},
            "field 'messages[0].role' is 'asistant', expected system, developer, user, assistant",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "is a part of type 'image', expected a string",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": ["x"]}]}, "holds a call without a function's name"),
        ({"messages": TURNS, "tools": "x"}, "field 'tools' is str, expected a list of tools"),
        ({"chosen": "a", "rejected": "b"}, "preferences ('chosen' and 'rejected'); --chosen takes the chosen answers"),
        ({"instruction": "", "output": "b"}, "field 'instruction' is empty"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "field 'history' is a list of 1, expected pairs"),
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
        ({"question": "", "choices": ["a", "b"], "answer": "b"}, "field 'question' is empty; field 'answer' is 'b'"),
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
        held = file / "data-00000-of-00001.arrow" if file.is_dir() else file
        assert reasons_of(file) == (
            f"{held}:2: field 'text' is NoneType, expected a string",
            f"{held}:3: field 'text' is empty",
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
    with pytest.raises(DataError, match="the folder holds no file of rows"):
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


def test_picked_rows_are_explained(tmp_path):
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
        if module.startswith("offsite."):
            return __import__(module, fromlist=["_"])
        raise ModuleNotFoundError(f"No module named {module!r}")

    monkeypatch.setattr(extras.importlib, "import_module", missing)
    with pytest.raises(UsageError) as caught:
        read_rows(file)
    assert "pyarrow" in caught.value.reasons[0]
    assert "[data]" in str(caught.value.next_step)


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
        ("rows.xlsx", "PK", "unsupported file type .xlsx: save its sheet as CSV"),
        ("rows.jsonl.zip", "PK", "unsupported file type .zip: unpack it"),
        ("rows.tar.gz", "", "unsupported file type .tar: unpack it"),
        ("rows.pkl", "", "unsupported file type .pkl: write it as Parquet"),
    ],
)
def test_files_of_other_kinds_are_told_as_a_whole(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=re.escape(says)):
        read_rows(tmp_path / name)


def conversation(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


PAIR = (Turn("user", "Hi"), Turn("assistant", "Hello"))


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        (conversation(("user", "Hi"), ("assistant", "Hello")) | {"prompt": "Hi", "prompt_id": "7"}, PAIR),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, PAIR),
        ({"conversation": [{"role": "User", "content": "Hi"}, {"role": "Assistant", "content": "Hello"}]}, PAIR),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "bot", "value": "Hello"}], "text": "x"}, PAIR),
        (
            {
                "system": "Brief.",
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
            },
            (Turn("system", "Brief."), *PAIR),
        ),
        ({"system": "", "messages": conversation(("user", "Hi"), ("assistant", "Hello"))["messages"]}, PAIR),
        ({"messages": json.dumps(conversation(("user", "Hi"), ("assistant", "Hello"))["messages"])}, PAIR),
        (
            {
                "messages": [
                    {"role": "user", "content": "Hi", "tool_calls": None, "name": None},
                    {"role": "assistant", "content": "Hello", "tool_calls": None},
                ]
            },
            PAIR,
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Hello", "weight": 0},
                    {"role": "assistant", "content": "Bye", "weight": 1},
                ]
            },
            (PAIR[0], Turn("assistant", "Hello", learnt=False), Turn("assistant", "Bye")),
        ),
        (
            {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]},
            (Turn("user", "Hi", learnt=False), PAIR[1]),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Hello", "reasoning_content": "hm"},
                ]
            },
            (PAIR[0], Turn("assistant", "Hello", more={"reasoning_content": "hm"})),
        ),
    ],
)
def test_conversations_as_public_sets_have_them(record, turns):
    row = parse_row(record, 1)
    assert row == Row(1, None, "", turns=turns)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
        {"role": "assistant", "tool_calls": '[{"function": {"name": "f", "arguments": {"a": 1}}}]'},
    ],
)
def test_calls_of_tools(message):
    row = parse_row({"messages": [message], "tools": '[{"name": "f"}]'}, 1)
    assert row.settings == {"tools": [{"name": "f"}]}
    assert row.turns[0].message == {
        "role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}],
    }  # fmt: skip


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": '{"a": 1}'}},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"a": 1}}]},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "parameters": {"a": 1}}]},
    ],
)
def test_calls_in_older_forms(message):
    row = parse_row({"conversations": [message, {"from": "observation", "value": "3"}]}, 1)
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert [turn.message for turn in row.turns] == [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
    ]


ALPACA = "Below is an instruction that describes a task"


@pytest.mark.parametrize(
    ("record", "asked", "output"),
    [
        ({"instruction": "Add.", "input": "1 1", "output": "2", "text": "all of it"}, "Add.\n1 1", "2"),
        ({"instruction": "Add.", "input": "", "output": "2"}, "Add.", "2"),
        ({"instruction": "Add.", "input": None, "output": "2"}, "Add.", "2"),
        ({"instruction": "Add.", "context": "1 1", "response": "2", "category": "qa"}, "Add.\n1 1", "2"),
        ({"instruction": "Use {input}.", "input": "{instruction}", "output": "2"}, "Use {input}.\n{instruction}", "2"),
    ],
)
def test_instructions(record, asked, output):
    row = parse_row(record, 1)
    assert row.turns == (Turn("user", asked), Turn("assistant", output))
    assert row.completion == output
    assert row.prompt.startswith(ALPACA)
    assert row.prompt.endswith("\n\n### Response:\n")
    given = record.get("input") or record.get("context")
    assert (f"### Input:\n{given}\n" in row.prompt) == bool(given)
    assert f"### Instruction:\n{record['instruction']}\n" in row.prompt


def test_an_instruction_with_a_system_and_a_history():
    record = {"instruction": "c", "output": "d", "system": "Brief.", "history": [["a", "b"]]}
    assert parse_row(record, 1).turns == (
        Turn("system", "Brief."), Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d"),
    )  # fmt: skip


ASKED, GOOD, POOR = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "assistant", "content": "No"},
)
EARLIER = [ASKED, {"role": "assistant", "content": "Yes?"}]


@pytest.mark.parametrize(
    ("record", "row"),
    [
        ({"prompt": "Hi", "chosen": " Hello", "rejected": " No"}, Row(1, "Hi", " Hello")),
        (
            {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Hero"},
            Row(1, "\n\nHuman: Hi\n\nAssistant:", " Hello"),
        ),
        (
            {"prompt": "Hi", "chosen": [ASKED, GOOD], "rejected": [ASKED, POOR]},
            Row(1, None, "", turns=(Turn("user", "Hi", learnt=False), PAIR[1])),
        ),
        (
            {"prompt": [ASKED], "chosen": [GOOD], "rejected": [POOR]},
            Row(1, None, "", turns=(Turn("user", "Hi", learnt=False), PAIR[1])),
        ),
        (
            {"prompt": "Hi", "chosen": [GOOD], "rejected": [POOR]},
            Row(1, None, "", turns=(Turn("user", "Hi", learnt=False), PAIR[1])),
        ),
        (
            {"chosen": [*EARLIER, ASKED, GOOD], "rejected": [*EARLIER, ASKED, POOR]},
            Row(
                1,
                None,
                "",
                turns=(
                    Turn("user", "Hi", learnt=False),
                    Turn("assistant", "Yes?", learnt=False),
                    Turn("user", "Hi", learnt=False),
                    PAIR[1],
                ),
            ),
        ),
        (
            {
                "conversations": [{"from": "human", "value": "Hi"}],
                "chosen": {"from": "gpt", "value": "Hello"},
                "rejected": {"from": "gpt", "value": "No"},
            },
            Row(1, None, "", turns=(Turn("user", "Hi", learnt=False), PAIR[1])),
        ),
    ],
)
def test_the_chosen_of_preferences_where_that_is_asked_for(record, row):
    assert parse_row(record, 1, RowForm(chosen=True)) == row


def test_the_chosen_of_an_instruction():
    row = parse_row({"instruction": "Add.", "input": "1 1", "chosen": "2", "rejected": "3"}, 1, RowForm(chosen=True))
    assert row.turns == (Turn("user", "Add.\n1 1"), Turn("assistant", "2"))


def test_messages_beside_preferences_are_taken_where_nothing_is_asked():
    record = {"prompt": "Hi", "messages": [ASKED, GOOD], "chosen": [ASKED, GOOD], "rejected": [ASKED, POOR]}
    assert parse_row(record, 1).turns == PAIR


@pytest.mark.parametrize(
    ("record", "answer"),
    [
        ({"choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}, "answerKey": "C"}, 2),
        ({"choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "3"}, 2),
        ({"choices": ["x", "y", "z"], "answer": "C"}, 2),
        ({"choices": ["x", "y", "z"], "answer": "2"}, 2),
        ({"choices": '["x", "y", "z"]', "answer": 2}, 2),
    ],
)
def test_choices_as_public_sets_have_them(record, answer):
    row = parse_row({"question": "q", **record}, 1)
    assert (row.choices, row.answer, row.completion) == ((" x", " y", " z"), answer, " z")


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ({"prompt": "question", "completion": "answer"}, Row(1, "q", "a")),
        ({"prompt": "question", "completion": "number"}, Row(1, "q", "3")),
        ({"text": "answer"}, Row(1, None, "a")),
        ({"completion": "answer"}, Row(1, "p", "a")),
        (
            {"prompt": "question", "completion": "answer", "system": "rules"},
            Row(1, "r\n\nq", "a", turns=(Turn("system", "r"), Turn("user", "q"), Turn("assistant", "a"))),
        ),
        (
            {"question": "question", "choices": "endings", "answer": "number_text"},
            Row(1, "Question: q\nAnswer:", " y", choices=(" x", " y"), answer=1),
        ),
        ({"instruction": "question", "output": "answer"}, parse_row({"instruction": "q", "output": "a"}, 1)),
        ({"messages": "talk"}, Row(1, None, "", turns=PAIR)),
    ],
)
def test_columns_of_other_names(columns, row):
    record = {
        "question": "q", "answer": "a", "number": 3, "number_text": "1", "text": "t", "prompt": "p", "rules": "r",
        "endings": ["x", "y"], "talk": [ASKED, GOOD],
    }  # fmt: skip
    assert parse_row(record, 1, RowForm(columns)) == row


def test_a_column_that_is_not_there():
    found = parse_row({"question": "q"}, 1, RowForm({"prompt": "question", "completion": "reply"}))
    assert found == "no field 'reply', which --columns names; fields 'question'"


def test_nulls_that_arrow_adds(tmp_path):
    records = [
        {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}]},
        {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "g", "arguments": {"b": 2}}}]}]},
        {"messages": [ASKED, GOOD]},
        {"text": "plain"},
    ]  # fmt: skip
    records = [{"messages": None, "text": None} | record for record in records]
    expected = read_rows(jsonl(tmp_path / "rows.jsonl", records))
    for file in (parquet(tmp_path / "rows.parquet", records), saved(tmp_path / "saved", records)):
        rows = read_rows(file)
        assert [row.turns for row in rows] == [row.turns for row in expected]
        assert [turn.message for row in rows for turn in row.turns] == [
            t.message for row in expected for t in row.turns
        ]
        assert rows[3] == expected[3]


def test_class_names_of_a_hub_set_are_the_words_to_learn(tmp_path):
    file = parquet(
        tmp_path / "rows.parquet", with_features({"text": ["good", "bad"], "label": [1, 0]}, label=["neg", "pos"])
    )
    rows = read_rows(file, RowForm({"prompt": "text", "completion": "label"}))
    assert [(row.prompt, row.completion) for row in rows] == [("good", "pos"), ("bad", "neg")]


def test_classes_that_are_answers_stay_numbers(tmp_path):
    table = with_features({"question": ["q"], "choices": [["x", "y"]], "answer": [1]}, answer=["A", "B"])
    (row,) = read_rows(parquet(tmp_path / "rows.parquet", table))
    assert (row.answer, row.completion) == (1, " y")


def with_features(columns, **names):
    """A table with the metadata that Hugging Face datasets writes for columns of classes."""
    import pyarrow

    features = {name: {"_type": "Value", "dtype": "string"} for name in columns}
    features |= {name: {"names": classes, "_type": "ClassLabel"} for name, classes in names.items()}
    table = pyarrow.table(columns)
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def test_an_empty_list_of_messages_is_no_conversation():
    assert parse_row({"messages": [], "prompt": "p", "completion": "c"}, 1) == Row(1, "p", "c")


@pytest.mark.parametrize("kind", ["text", "input_text", "output_text"])
def test_parts_of_text_by_their_types(kind):
    row = parse_row(
        {"messages": [{"role": "assistant", "content": [{"type": kind, "text": "Hello", "index": None}]}]}, 1
    )
    assert row.turns[0].message == {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]}


def test_an_answer_that_is_reasoning_alone():
    row = parse_row({"messages": [{"role": "assistant", "content": "", "reasoning_content": "hm"}]}, 1)
    assert row.turns[0].message == {"role": "assistant", "content": "", "reasoning_content": "hm"}
