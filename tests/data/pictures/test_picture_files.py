import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from offsite.data.pictures import picture_files, prepared_pictures
from offsite.data.pictures.picture_files import Picture, augmented, decode, load_processor
from offsite.data.pictures.picture_sets import held_out_part, read_pictures, split_by_seed
from offsite.data.pictures.prepared_pictures import Pictures
from offsite.errors import DataError, IncompatibleError, UsageError
from tiny import tiny_pictures, tiny_vision_base


def pixels(height: int = 8, width: int = 12) -> Any:
    return np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)


def saved(file: Path, image: Image.Image, **options: Any) -> Picture:
    image.save(file, **options)
    return Picture(file.name, file, None)


def test_a_folder_with_a_sub_folder_for_each_class(tmp_path: Path) -> None:
    found = read_pictures(tiny_pictures(tmp_path / "set", 2))
    assert [picture.label for picture in found] == ["blue", "blue", "green", "green", "red", "red"]
    assert [Path(picture.name).name for picture in found] == ["0.png", "1.png"] * 3


def test_a_folder_with_parts(tmp_path: Path) -> None:
    tiny_pictures(tmp_path / "set" / "train", 2)
    tiny_pictures(tmp_path / "set" / "val", 1)
    assert held_out_part(tmp_path / "set")
    assert len(read_pictures(tmp_path / "set", part="train")) == 6
    assert len(read_pictures(tmp_path / "set", part="held out")) == 3
    assert not held_out_part(tiny_pictures(tmp_path / "whole", 1))
    assert len(read_pictures(tmp_path / "whole", part="held out")) == 3


@pytest.mark.parametrize("part", ["train", "held out"])
@pytest.mark.parametrize("name", ["train", "valid", "test"])
def test_a_class_may_have_the_name_of_a_part(tmp_path: Path, name: str, part: str) -> None:
    (tiny_pictures(tmp_path / "set", 2) / "red").rename(tmp_path / "set" / name)
    found = read_pictures(tmp_path / "set", part=part)
    assert {picture.label for picture in found} == {"blue", "green", name}
    assert not held_out_part(tmp_path / "set")


def test_what_a_dot_hides_is_no_picture(tmp_path: Path) -> None:
    folder = tiny_pictures(tmp_path / ".set", 1)
    for place in (folder / ".ipynb_checkpoints" / "0.png", folder / "red" / "._0.png", folder / ".loose.png"):
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels()).save(place)
    assert [picture.label for picture in read_pictures(folder)] == ["blue", "green", "red"]


def test_pictures_without_classes(tmp_path: Path) -> None:
    tiny_pictures(tmp_path / "set", 1)
    Image.fromarray(pixels()).save(tmp_path / "set" / "loose.png")
    assert len(read_pictures(tmp_path / "set", labelled=False)) == 4
    with pytest.raises(DataError, match="in no class") as caught:
        read_pictures(tmp_path / "set")
    assert caught.value.reasons == ("loose.png",)


def test_a_table_of_paths(tmp_path: Path) -> None:
    tiny_pictures(tmp_path / "set", 1)
    (tmp_path / "list.csv").write_text("path,label\nset/red/0.png,warm\nset/blue/0.png,cold\n")
    found = read_pictures(tmp_path / "list.csv")
    assert [picture.label for picture in found] == ["warm", "cold"]
    assert decode(found[0]).shape[2] == 3


@pytest.mark.parametrize("as_struct", [True, False])
def test_parquet_with_bytes(tmp_path: Path, as_struct: bool) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    Image.fromarray(pixels()).save(buffer, "PNG")
    content = buffer.getvalue()
    cells = [{"bytes": content, "path": "a.png"} if as_struct else content] * 2
    parquet.write_table(arrow.table({"image": cells, "label": [0, 1]}), tmp_path / "set.parquet")
    found = read_pictures(tmp_path / "set.parquet")
    assert [picture.label for picture in found] == ["0", "1"]
    assert (decode(found[0]) == pixels()).all()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("path,label\n,cat\n", ":2: no field 'path'"),
        ("path,label\na.png,\n", "field 'label'"),
        ("x\n1\n", "field 'label'"),
    ],
)
def test_bad_rows_of_a_table(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "list.csv").write_text(content)
    with pytest.raises(DataError, match="1 bad row") as caught:
        read_pictures(tmp_path / "list.csv")
    assert says in caught.value.reasons[0]


def test_what_is_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no picture"):
        read_pictures(tmp_path / "empty")
    with pytest.raises(DataError, match="not a data set of pictures"):
        read_pictures(tmp_path / "none")


def test_split_by_seed() -> None:
    listed = [Picture(str(i), Path(str(i)), "ab"[i % 2]) for i in range(20)]
    train, held_out = split_by_seed(listed, 0.2, 3)
    assert (train, held_out) == split_by_seed(listed, 0.2, 3)
    assert held_out != split_by_seed(listed, 0.2, 4)[1]
    assert sorted(picture.label or "" for picture in held_out) == ["a", "a", "b", "b"]
    assert {*train, *held_out} == {*listed}
    assert len(train) == 16


def test_a_share_of_less_than_a_picture_is_refused() -> None:
    listed = [Picture(str(i), Path(str(i)), "ab"[i % 2]) for i in range(12)]
    with pytest.raises(UsageError, match="holds out no picture") as caught:
        split_by_seed(listed, 0.05, 0)
    assert caught.value.reasons == ("the largest class has 6 pictures",)


@pytest.mark.parametrize(("kind", "most"), [("png", 0), ("webp", 0), ("jpg", 12)])
def test_formats(tmp_path: Path, kind: str, most: int) -> None:
    smooth = np.repeat(np.arange(0, 240, 20, dtype=np.uint8)[None, :, None], 8, axis=0).repeat(3, axis=2)
    picture = saved(tmp_path / f"a.{kind}", Image.fromarray(smooth), **({"lossless": True} if kind == "webp" else {}))
    assert np.abs(decode(picture).astype(int) - smooth).max() <= most


def test_grey_alpha_palette_and_sixteen_bits(tmp_path: Path) -> None:
    grey = pixels()[..., 0]
    assert (decode(saved(tmp_path / "grey.png", Image.fromarray(grey))) == grey[..., None]).all()
    alpha = np.concatenate([pixels(), np.full((8, 12, 1), 7, np.uint8)], axis=2)
    assert (decode(saved(tmp_path / "alpha.png", Image.fromarray(alpha))) == pixels()).all()
    palette = Image.fromarray(grey).convert("P")
    assert decode(saved(tmp_path / "palette.png", palette)).shape == (8, 12, 3)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert (decode(saved(tmp_path / "deep.png", deep)) == grey[..., None]).all()


def test_a_picture_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    turned = decode(saved(tmp_path / "a.png", Image.fromarray(pixels()), exif=exif))
    assert (turned == np.rot90(pixels(), k=-1)).all()


def huge(file: Path) -> Path:
    """A PNG of some bytes that announces 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")
    file.write_bytes(content)
    return file


def test_bad_pictures_are_named_and_left_out_only_on_demand(tmp_path: Path) -> None:
    processor = load_processor(tiny_vision_base(tmp_path / "base", blocks=1))
    folder = tiny_pictures(tmp_path / "set", 2)
    huge(folder / "red" / "huge.png")
    (folder / "red" / "text.png").write_text("no picture")
    cut = (folder / "red" / "0.png").read_bytes()
    (folder / "red" / "cut.png").write_bytes(cut[: len(cut) // 2])
    (folder / "red" / "other.png").write_bytes(b"GIF89a\x01\x00\x01\x00\x00\x00\x00;")
    (folder / "red" / "scan.DCM").write_bytes(b"\0" * 128 + b"DICM")
    (folder / "red" / "notes.txt").write_text("no picture, nor meant to be one")
    with pytest.raises(DataError, match="5 pictures cannot be read") as caught:
        Pictures(read_pictures(folder), processor)
    for name in ("huge.png", "text.png", "cut.png", "other.png", "scan.DCM"):
        assert any(name in reason for reason in caught.value.reasons)
    assert "--skip-bad" in (caught.value.next_step or "")
    kept = Pictures(read_pictures(folder), processor, skip_bad=True)
    assert (len(kept), len(kept.skipped)) == (6, 5)
    assert kept.batch(range(6)).shape == (6, 3, 16, 16)
    with pytest.raises(DataError):
        Pictures([Picture("huge", huge(tmp_path / "a.png"), None)], processor, skip_bad=True)


def test_bombs_that_pillow_itself_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_files, "MOST_PIXELS", 10**12)
    with pytest.raises(DataError) as caught:
        decode(Picture("bomb", huge(tmp_path / "a.png"), None))
    assert "DecompressionBombError" in caught.value.reasons[0]


def test_what_is_prepared_is_what_a_pipeline_prepares(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor
    from transformers.image_utils import load_image

    base = tiny_vision_base(tmp_path / "base", blocks=1)
    listed = read_pictures(tiny_pictures(tmp_path / "set", 1))
    ours = Pictures(listed, load_processor(base)).batch([0, 2])
    theirs = AutoImageProcessor.from_pretrained(base)
    for place, row in enumerate([0, 2]):
        assert (
            theirs(load_image(str(listed[row].source)), return_tensors="np")["pixel_values"][0] == ours[place]
        ).all()


def test_pictures_that_do_not_fit_into_memory_are_decoded_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = load_processor(tiny_vision_base(tmp_path / "base", blocks=1))
    listed = read_pictures(tiny_pictures(tmp_path / "set", 2))
    whole = Pictures(listed, processor).batch(range(6))
    monkeypatch.setattr(prepared_pictures, "CACHE_BYTES", 3000)
    assert (Pictures(listed, processor).batch(range(6)) == whole).all()


def test_augmentation_is_a_function_of_its_numbers() -> None:
    def made(*numbers: int) -> Any:
        return augmented(pixels(20, 30), (16, 16), np.random.default_rng(numbers))

    assert made(0, 1, 2).shape == (16, 16, 3)
    assert (made(0, 1, 2) == made(0, 1, 2)).all()
    assert len({made(0, epoch, row).tobytes() for epoch in range(4) for row in range(4)}) == 16
    for row in range(50):  # also of what is thin
        assert augmented(pixels(1, 40), (4, 4), np.random.default_rng(row)).shape == (4, 4, 3)


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ({"height": 32, "width": 32}, "the model has positions for 16 x 16"),
        ({"height": 18, "width": 18}, "patches of 4 do not fill"),
        ({"shortest_edge": 16}, "wide and high pictures become"),
    ],
)
def test_a_processor_that_does_not_fit_the_model(tmp_path: Path, size: dict[str, int], says: str) -> None:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    base = tiny_vision_base(tmp_path / "base", blocks=1)
    ViTImageProcessorPil(size=size, default_to_square="shortest_edge" not in size).save_pretrained(base)
    with pytest.raises(IncompatibleError, match="does not make what the model takes") as caught:
        load_processor(base)
    assert any(says in reason for reason in caught.value.reasons)


def test_positions_that_a_family_fits_to_the_image(tmp_path: Path) -> None:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    base = tiny_vision_base(tmp_path / "base", "dinov2", blocks=1)
    ViTImageProcessorPil(size={"height": 32, "width": 24}).save_pretrained(base)
    assert load_processor(base).side == (32, 24)


def test_no_processor(tmp_path: Path) -> None:
    base = tiny_vision_base(tmp_path / "base", blocks=1)
    (base / "preprocessor_config.json").unlink()
    with pytest.raises(IncompatibleError, match="image processor"):
        load_processor(base)
