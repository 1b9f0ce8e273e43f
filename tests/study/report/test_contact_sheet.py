import json
from pathlib import Path

import pytest
from PIL import Image

from offsite.data.pictures.picture_files import Picture
from offsite.errors import DataError
from offsite.study.report.contact_sheet import _RIGHT, _WRONG, PredictedPicture, draw_sheet, read_predictions
from tiny import tiny_pictures


def colours(file: Path) -> set[tuple[int, ...]]:
    with Image.open(file) as sheet:
        return {colour for _, colour in sheet.convert("RGB").getcolors(2**24)}


def rgb(text: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(text.removeprefix("#")))


@pytest.mark.parametrize(("told", "right"), [(("cat", "cat"), True), (("dog", "dog"), False)])
def test_right_and_wrong_look_different(tmp_path: Path, told: tuple[str, ...], right: bool) -> None:
    Image.new("RGB", (30, 12), (10, 200, 10)).save(tmp_path / "one.png")
    picture = Picture("one", tmp_path / "one.png", "cat")
    draw_sheet(tmp_path / "sheet.png", [PredictedPicture(picture, told)], ("before", "after"))
    found = colours(tmp_path / "sheet.png")
    assert (10, 200, 10) in found
    assert (rgb(_RIGHT) in found, rgb(_WRONG) in found) == (right, not right)


def test_long_names_end_where_their_picture_does(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "white").save(tmp_path / "one.png")
    sizes = set()
    for name in ("a", "a class with a name that is far too long for the room that there is"):
        picture = Picture("one", tmp_path / "one.png", name)
        draw_sheet(tmp_path / "sheet.png", [PredictedPicture(picture, (name,))], ("before",))
        with Image.open(tmp_path / "sheet.png") as sheet:
            sizes.add(sheet.size)
            right = sheet.convert("RGB").crop((sheet.width - 20, 0, sheet.width, sheet.height))
            assert right.getcolors() == [(20 * sheet.height, (255, 255, 255))]
    assert len(sizes) == 1


def test_pictures_are_taken_evenly_and_by_their_line(tmp_path: Path) -> None:
    pictures = tiny_pictures(tmp_path / "set", 10)
    lines = [line for line in range(1, 31) if line != 3]  # one could not be read
    rows = [{"line": line, "nats": 1.0, "tokens": 1} for line in lines]
    told = [{"line": line, "right": True, "told": f"class {line}"} for line in lines]
    file = tmp_path / "scores"
    file.write_text("".join(json.dumps(row) + "\n" for row in (*rows, *told)))
    shown = read_predictions(pictures, [file, file])
    assert [one.picture.label for one in shown] == 4 * ["blue"] + 4 * ["green"] + 4 * ["red"]
    assert shown[0].predictions == ("class 2", "class 2")
    assert Path(shown[0].picture.name).name == "1.png"
    other = tmp_path / "other"
    other.write_text(file.read_text().replace('"line": 5', '"line": 55'))
    with pytest.raises(ValueError, match="different rows"):
        read_predictions(pictures, [file, other])


def test_a_picture_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone"):
        draw_sheet(
            tmp_path / "sheet.png", [PredictedPicture(Picture("gone", tmp_path / "gone.png", "x"), ("x",))], ("before",)
        )
    assert not (tmp_path / "sheet.png").exists()
