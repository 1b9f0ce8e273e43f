"""Sets of pictures as they are downloaded: parts, class names, shards, lists."""

import io
import json
import unicodedata

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from offsite.data.pictures.picture_sets import held_out_part, read_pictures
from offsite.errors import DataError
from tiny import tiny_pictures

NAMES = ["blue", "green", "red"]


def png(level=0):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def hub_table(labels, *, image="image", label="label", names=NAMES, features=True):
    """A table as Hugging Face datasets pushes it to the hub."""
    table = pyarrow.table({image: [{"bytes": png(i), "path": None} for i in range(len(labels))], label: labels})
    if not features:
        return table
    info = {image: {"_type": "Image"}, label: {"_type": "ClassLabel", "names": names}}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": info}})})


def write(table, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, file)
    return file


def labels(data, **settings):
    return [picture.label for picture in read_pictures(data, **settings)]


@pytest.mark.parametrize(
    ("train", "held_out"),
    [("Train", "Test"), ("TRAIN", "VAL"), ("training", "testing"), ("train", "dev"), ("Training", "Validation")],
)
def test_parts_in_any_case(tmp_path, train, held_out):
    tiny_pictures(tmp_path / train, 2)
    tiny_pictures(tmp_path / held_out, 1)
    assert held_out_part(tmp_path)
    assert labels(tmp_path, part="train") == ["blue", "blue", "green", "green", "red", "red"]
    assert labels(tmp_path, part="held out") == ["blue", "green", "red"]


def test_a_folder_around_the_parts(tmp_path):
    tiny_pictures(tmp_path / "flowers" / "train", 2)
    tiny_pictures(tmp_path / "flowers" / "test", 1)
    (tmp_path / "__MACOSX" / "flowers").mkdir(parents=True)
    (tmp_path / "__MACOSX").rename(tmp_path / ".macosx")
    assert (len(read_pictures(tmp_path, part="train")), len(read_pictures(tmp_path, part="held out"))) == (6, 3)


def test_one_part_alone(tmp_path):
    tiny_pictures(tmp_path / "Train", 1)
    assert labels(tmp_path, part="train") == NAMES
    assert not held_out_part(tmp_path)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_the_forms_of_one_name_are_one_class(tmp_path, form):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    (tiny_pictures(tmp_path / "train", 1) / "red").rename(tmp_path / "train" / unicodedata.normalize(form, "café"))
    (tiny_pictures(tmp_path / "test", 1) / "red").rename(tmp_path / "test" / unicodedata.normalize(other, "café"))
    composed = unicodedata.normalize("NFC", "café")
    assert labels(tmp_path, part="train") == labels(tmp_path, part="held out") == ["blue", composed, "green"]
    listed = tmp_path / "list.csv"
    listed.write_text(
        f"path,label\ntrain/{unicodedata.normalize(other, 'café')}/0.png,{unicodedata.normalize('NFD', 'café')}\n"
    )
    (picture,) = read_pictures(listed)
    assert picture.label == composed
    assert picture.source.exists()


def test_the_class_names_of_a_hub_set(tmp_path):
    file = write(hub_table([2, 0, 1]), tmp_path / "set.parquet")
    assert labels(file) == ["red", "blue", "green"]
    assert labels(write(hub_table([2, 0], features=False), tmp_path / "plain.parquet")) == ["2", "0"]


def test_shards_of_a_hub_set(tmp_path):
    write(hub_table([2, 0]), tmp_path / "data" / "train-00000-of-00002.parquet")
    write(hub_table([1]), tmp_path / "data" / "train-00001-of-00002.parquet")
    write(hub_table([0]), tmp_path / "data" / "test-00000-of-00001.parquet")
    assert held_out_part(tmp_path)
    assert labels(tmp_path, part="train") == ["red", "blue", "green"]
    assert labels(tmp_path, part="held out") == ["blue"]


@pytest.mark.parametrize(("image", "label"), [("img", "fine_label"), ("picture", "labels")])
def test_columns_are_known_by_what_the_set_says_of_them(tmp_path, image, label):
    assert labels(write(hub_table([2], image=image, label=label), tmp_path / "set.parquet")) == ["red"]


def test_columns_of_other_names(tmp_path):
    file = write(hub_table([2], image="img", label="kind", features=False), tmp_path / "set.parquet")
    with pytest.raises(DataError, match="1 bad row") as caught:
        read_pictures(file)
    assert "--columns image=img,label=fine_label" in caught.value.next_step
    assert labels(file, columns={"image": "img", "label": "kind"}) == ["2"]


def test_a_label_that_is_hidden(tmp_path):
    with pytest.raises(DataError) as caught:
        read_pictures(write(hub_table([0, -1]), tmp_path / "set.parquet"))
    assert caught.value.reasons == (f"{tmp_path / 'set.parquet'}:2: field 'label' is -1, expected a class from 0 to 2",)


def test_a_set_that_save_to_disk_wrote(tmp_path):
    for part, numbers in (("train", [2, 0]), ("test", [1])):
        table = hub_table(numbers, features=False)
        (tmp_path / part).mkdir()
        with (
            pyarrow.OSFile(str(tmp_path / part / "data.arrow"), "wb") as sink,
            pyarrow.ipc.new_stream(sink, table.schema) as out,
        ):
            out.write_table(table)
        (tmp_path / part / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": NAMES}}
        (tmp_path / part / "dataset_info.json").write_text(json.dumps({"features": features}))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert held_out_part(tmp_path)
    assert labels(tmp_path, part="train") == ["red", "blue"]
    assert labels(tmp_path, part="held out") == ["green"]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_labels_in_a_list_beside_the_pictures(tmp_path, name):
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    (tmp_path / name).write_text(
        "file_name,label\n0.png,cat\n1.png,dog\n"
        if name.endswith("csv")
        else '{"file_name": "0.png", "label": "cat"}\n{"file_name": "1.png", "label": "dog"}\n'
    )
    assert labels(tmp_path) == ["cat", "dog"]


def test_several_sets_are_joined(tmp_path):
    one, other = tiny_pictures(tmp_path / "one", 1), tiny_pictures(tmp_path / "other", 1)
    assert labels([one, other]) == [*NAMES, *NAMES]
