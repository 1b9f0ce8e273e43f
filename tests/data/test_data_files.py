"""Which files a data set is made of."""

import json
import unicodedata
from pathlib import Path

import pytest

from offsite.data.data_files import data_digest, files_of, part_name
from offsite.data.read_rows import read_rows
from offsite.errors import DataError


def lines(file, *texts):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def parquet(file, *texts):
    import pyarrow.parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": list(texts)}), file)


def arrow(file, *texts, stream=True):
    import pyarrow

    file.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"text": list(texts)})
    make = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with pyarrow.OSFile(str(file), "wb") as sink, make(sink, table.schema) as writer:
        writer.write_table(table)


def saved(folder, *texts):
    arrow(folder / "data-00000-of-00001.arrow", *texts)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (folder / "dataset_info.json").write_text("{}")


def texts(path, part="train"):
    return [row.completion for row in read_rows(path, part=part)]


def parts(folder):
    return texts(folder), texts(folder, "held out")


def test_shards_of_a_hub_set(tmp_path):
    (tmp_path / "README.md").write_text("---\n---\n")
    (tmp_path / ".gitattributes").write_text("")
    (tmp_path / "dataset_infos.json").write_text("{}")
    parquet(tmp_path / "data" / "train-00000-of-00002.parquet", "a", "b")
    parquet(tmp_path / "data" / "train-00001-of-00002-0123456789abcdef.parquet", "c")
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", "d")
    for place in (tmp_path, tmp_path / "data"):
        assert parts(place) == (["a", "b", "c"], ["d"])
    assert [row.place() for row in read_rows(tmp_path)][2].endswith("train-00001-of-00002-0123456789abcdef.parquet:1")


@pytest.mark.parametrize(
    ("train", "held_out"),
    [("train.jsonl", "validation.jsonl"), ("Train.jsonl", "VAL.jsonl"), ("training.jsonl", "dev.jsonl"),
     ("my_train.jsonl", "my_test.jsonl"), ("gsm8k-train.jsonl", "gsm8k-eval.jsonl"), ("train/a.jsonl", "test/a.jsonl"),
     ("Train/0.jsonl", "Valid/0.jsonl"), ("a.jsonl", "test.jsonl"), ("train.jsonl.gz", "test.jsonl")],
)  # fmt: skip
def test_parts_are_known_by_their_names(tmp_path, train, held_out):
    lines(tmp_path / train, "a")
    lines(tmp_path / held_out, "b")
    assert parts(tmp_path) == (["a"], ["b"])


def test_of_two_held_out_parts_validation_is_taken(tmp_path):
    for name in ("train", "test", "validation"):
        lines(tmp_path / f"{name}.jsonl", name)
    assert parts(tmp_path) == (["train"], ["validation"])


def test_a_folder_of_one_part_is_taken_for_either(tmp_path):
    lines(tmp_path / "part-00000.jsonl", "a")
    lines(tmp_path / "part-00001.jsonl", "b")
    assert parts(tmp_path) == (["a", "b"], ["a", "b"])


def test_parts_that_cannot_be_told_apart(tmp_path):
    for name in ("train_sft", "train_gen", "test_sft", "test_gen"):
        parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet", name)
    for part, kind in (("train", "train"), ("held out", "test")):
        with pytest.raises(DataError, match="it is not clear which part") as caught:
            texts(tmp_path, part)
        assert "'test_gen', 'test_sft', 'train_gen', 'train_sft'" in caught.value.reasons[0]
        pattern = caught.value.next_step.rpartition(": ")[2].strip("'")
        assert texts(tmp_path / pattern) == [f"{kind}_gen"]  # the next step works


def test_patterns(tmp_path):
    for name in ("a-1.jsonl", "a-2.jsonl", "b-1.jsonl"):
        lines(tmp_path / name, name)
    assert texts(tmp_path / "a-*.jsonl") == ["a-1.jsonl", "a-2.jsonl"]
    assert texts(tmp_path / "?-1.jsonl") == ["a-1.jsonl", "b-1.jsonl"]
    with pytest.raises(DataError, match="no file has such a name"):
        texts(tmp_path / "c*.jsonl")
    lines(tmp_path / "[x].jsonl", "a name")
    assert texts(tmp_path / "[x].jsonl") == ["a name"]


def test_a_saved_dataset_dict(tmp_path):
    saved(tmp_path / "train", "a")
    saved(tmp_path / "test", "b")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert parts(tmp_path) == (["a"], ["b"])
    assert texts(tmp_path / "test") == ["b"]


def test_arrow_files_and_streams(tmp_path):
    arrow(tmp_path / "stream.arrow", "a")
    arrow(tmp_path / "file.arrow", "b", stream=False)
    assert texts(tmp_path / "stream.arrow") == ["a"]
    assert texts(tmp_path / "file.arrow") == ["b"]


def test_an_entry_of_the_hub_s_cache(tmp_path):
    blob = tmp_path / "datasets--me--set" / "blobs" / "0f"
    lines(blob, "a")
    snapshot = tmp_path / "datasets--me--set" / "snapshots" / "0123" / "data"
    snapshot.mkdir(parents=True)
    (snapshot / "train-00000-of-00001.jsonl").symlink_to(blob)
    assert texts(tmp_path / "datasets--me--set") == ["a"]


def test_several_sets_in_one_folder(tmp_path):
    lines(tmp_path / "main" / "train.jsonl", "a")
    lines(tmp_path / "socratic" / "train.jsonl", "b")
    with pytest.raises(DataError, match="holds several data sets: main, socratic"):
        texts(tmp_path)


def test_files_of_several_kinds(tmp_path):
    lines(tmp_path / "train.jsonl", "a")
    parquet(tmp_path / "train.parquet", "a")
    with pytest.raises(DataError, match=r"files of several kinds: train\.jsonl, train\.parquet"):
        texts(tmp_path)


def test_plain_texts_of_a_folder(tmp_path):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == ["a.txt", "b.txt"]
    lines(tmp_path / "rows.jsonl", "row")  # then texts are a licence and the like
    assert texts(tmp_path) == ["row"]


def test_a_folder_without_rows(tmp_path):
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(DataError, match=r"no file of rows, but model\.safetensors"):
        texts(tmp_path)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_with_accents_have_two_forms(tmp_path, form):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    lines(tmp_path / unicodedata.normalize(form, "Café.jsonl"), "a")
    assert texts(tmp_path / unicodedata.normalize(other, "Café.jsonl")) == ["a"]
    assert data_digest(tmp_path / unicodedata.normalize(other, "Café.jsonl")) == data_digest(
        tmp_path / unicodedata.normalize(form, "Café.jsonl")
    )


def test_several_data_sets_are_joined(tmp_path):
    one, other = lines(tmp_path / "a.jsonl", "a"), lines(tmp_path / "b.jsonl", "b", "c")
    rows = read_rows([one, other])
    assert [(row.completion, row.place()) for row in rows] == [
        ("a", f"{one}:1"), ("b", f"{other}:1"), ("c", f"{other}:2"),
    ]  # fmt: skip
    assert data_digest([one, other]) != data_digest([other, one]) != data_digest(one) == data_digest([one])


def test_bad_rows_of_joined_sets_are_named_by_their_files(tmp_path):
    one, other = lines(tmp_path / "a.jsonl", "a", ""), lines(tmp_path / "b.jsonl", "")
    with pytest.raises(DataError, match=r"2 bad rows in .*a.jsonl \+ .*b.jsonl") as caught:
        read_rows([one, other])
    assert [reason.partition(": ")[0] for reason in caught.value.reasons] == [f"{one}:2", f"{other}:1"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"text": "a"}, {"text": "b"}]', ["a", "b"]),
        ('{"version": "1", "data": [{"text": "a"}, {"text": "b"}]}', ["a", "b"]),
        ('[\n  {\n    "text": "a"\n  },\n  {\n    "text": "b"\n  }\n]', ["a", "b"]),
        ('{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
        ('{\n"text": "a"\n}', ["a"]),
    ],
)
def test_json_files(tmp_path, content, expected):
    (tmp_path / "rows.json").write_text(content)
    assert texts(tmp_path / "rows.json") == expected


def test_a_list_of_other_things(tmp_path):
    (tmp_path / "rows.json").write_text('[{"text": "a"}, 3]')
    with pytest.raises(DataError, match="1 bad row") as caught:
        texts(tmp_path / "rows.json")
    assert caught.value.reasons == (f"{tmp_path / 'rows.json'}:2: a int, expected an object",)


def test_tables_with_tabs(tmp_path):
    (tmp_path / "rows.tsv").write_text('text\tid\n"a\tb"\t1\nc, d\t2\n')
    assert texts(tmp_path / "rows.tsv") == ["a\tb", "c, d"]


@pytest.mark.parametrize(
    ("name", "part"),
    [("train-00000-of-00002.parquet", "train"), ("train_sft-00000-of-00001.parquet", "train_sft"), ("0000.parquet", ""),
     ("part-00003.jsonl.gz", ""), ("alpaca_data.json", ""), ("dolly-15k.jsonl", ""), ("my.test.jsonl", "test"),
     ("validation-00000-of-00001-0123456789abcdef.parquet", "validation"), ("training.csv", "training")],
)  # fmt: skip
def test_the_part_in_a_name(tmp_path, name, part):
    assert part_name(tmp_path / name) == part


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    for i in (2, 0, 1):
        lines(tmp_path / f"train-0000{i}-of-00003.jsonl", str(i))
    assert [file.name[:11] for file in files_of(tmp_path)] == ["train-00000", "train-00001", "train-00002"]


def test_a_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="there is no file or folder tatsu-lab/alpaca") as caught:
        texts(Path("tatsu-lab/alpaca"))
    assert "hf download --repo-type dataset tatsu-lab/alpaca --local-dir alpaca" in caught.value.next_step
    with pytest.raises(DataError, match="cannot read the data set"):
        texts(Path("tatsu-lab/alpaca.json"))
