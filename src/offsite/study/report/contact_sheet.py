"""Draws a dozen test pictures with their classes and two models' predictions, as a PNG file, with Pillow.

Right and wrong differ in shape and in colour (Okabe and Ito's), for the colour-blind too.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offsite.data.pictures.picture_files import Picture, decode
from offsite.data.pictures.picture_sets import read_pictures
from offsite.evaluation.row_scores import RowScores, read_row_scores, require_same_rows
from offsite.extras import require
from offsite.storage.files import replace_file
from offsite.study.grid import GridPoint
from offsite.study.report.plots import Plot
from offsite.study.report.report_tables import LABELS
from offsite.study.run_grid import read_record

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

NOTE = "Test pictures taken evenly over the set, not chosen. Blue disc: classified correctly; orange square: wrongly."
_COUNT, _COLUMNS = 12, 6
_SIDE, _GAP, _LINE, _MARK = 176, 20, 24, 14  # pixels of a picture, between them, of a line of text, of a mark
_TEXT, _QUIET, _RIGHT, _WRONG = "#1d1d1f", "#5c5f66", "#0072b2", "#d55e00"
_FONT = 16


@dataclass(frozen=True)
class PredictedPicture:
    """A test picture, and the class that each model predicted for it."""

    picture: Picture
    predictions: tuple[str, ...]


def sheets(points: Sequence[GridPoint], folder: Path) -> list[Plot]:
    """Draw a contact sheet for each data set of pictures, from its first grid point with zero-shot and plug-in scores.

    Args:
        points: the grid points of the study.
        folder: the study's folder; sheets are written to its `plots/`.

    Raises:
        DataError: a picture does not exist any more, or is broken.
        StorageError: a sheet cannot be written.
    """
    made: dict[str, Plot] = {}
    for point in points:
        stages = [point.rows[row] for row in ("zero_shot", "plug_in") if row in point.rows]
        there = [stage.out for stage in stages if read_record(folder, stage).get("done") and stage.out.exists()]
        if point.dataset.name in made or not point.data.pictures or len(there) < 2:
            continue
        file = folder / "plots" / f"predictions-{point.dataset.name.replace('/', '-')}.png"
        names = (LABELS["zero_shot"], LABELS["plug_in"])
        draw_sheet(file, read_predictions(point.data.test, there), names)
        how = ", ".join(part for part in (point.compressor.name, point.compressor.placement, point.method.name) if part)
        made[point.dataset.name] = Plot(file, f"Before and after: {point.dataset.name}", f"{how}. {NOTE}")
    return list(made.values())


def read_predictions(test: Path, scores: Sequence[Path]) -> list[PredictedPicture]:
    """Choose some of the test pictures, spread evenly, and read each model's prediction from its file of row scores.

    Raises:
        DataError: there are no pictures any more.
        StorageError: a file of scores cannot be read.
        ValueError: the models were scored on different pictures.
    """
    listed = read_pictures(test, part="held out")
    found: list[RowScores] = [read_row_scores(file) for file in scores]
    require_same_rows(found)
    lines = found[0].lines
    count = min(_COUNT, len(lines))
    places = [(2 * i + 1) * len(lines) // (2 * count) for i in range(count)]
    return [PredictedPicture(listed[lines[at] - 1], tuple(one.predictions[at] for one in found)) for at in places]


def draw_sheet(file: Path, shown: Sequence[PredictedPicture], names: Sequence[str]) -> None:
    """Draw pictures into a PNG file; below each picture are its class and, for each model, the predicted class.

    Args:
        file: the PNG file.
        shown: the pictures with the predictions.
        names: the names of the models, in the order of `PredictedPicture.predictions`.

    Raises:
        UsageError: Pillow is not installed.
        DataError: a picture is broken.
        StorageError: the file cannot be written.
    """
    image, drawing, fonts = (
        require(f"PIL.{part}", "vision", "drawing pictures") for part in ("Image", "ImageDraw", "ImageFont")
    )
    columns = min(_COLUMNS, len(shown))
    high = _SIDE + (1 + len(names)) * _LINE + _GAP + _LINE // 2
    lines = -(-len(shown) // columns)
    sheet = image.new("RGB", (columns * (_SIDE + _GAP) + _GAP, lines * high + _GAP), "white")
    pen, font = drawing.Draw(sheet), fonts.load_default(_FONT)
    for number, one in enumerate(shown):
        left, top = _GAP + number % columns * (_SIDE + _GAP), _GAP + number // columns * high
        sheet.paste(_thumbnail(image, one.picture), (left, top))
        _write(pen, font, (left, top + _SIDE + 6), one.picture.label or "", _TEXT)
        for place, (name, predicted) in enumerate(zip(names, one.predictions, strict=True), start=1):
            at = (left, top + _SIDE + 6 + place * _LINE)
            _mark(pen, at, right=predicted == one.picture.label)
            _write(pen, font, (left + _MARK + 6, at[1]), f"{name}: {predicted}", _QUIET)
    content = io.BytesIO()
    sheet.save(content, "PNG", optimize=True)
    replace_file(file, content.getvalue())


def _thumbnail(image: Any, picture: Picture) -> Any:
    """Fit a whole picture into a square; a small picture is enlarged without smoothing."""
    found = image.fromarray(decode(picture))
    scale = _SIDE / max(found.size)
    size = tuple(max(1, round(scale * side)) for side in found.size)
    fitted = found.resize(size, image.Resampling.NEAREST if scale > 2 else image.Resampling.LANCZOS)
    square = image.new("RGB", (_SIDE, _SIDE), "#f2f2f2")
    square.paste(fitted, ((_SIDE - size[0]) // 2, (_SIDE - size[1]) // 2))
    return square


def _mark(pen: "ImageDraw", at: tuple[int, int], *, right: bool) -> None:
    """Draw the mark for a right prediction (a disc with a tick) or for a wrong one (a square with a cross).

    `at` is its left upper corner in pixels.
    """
    left, top = at[0], at[1] + 3
    end = (left + _MARK, top + _MARK)
    if right:
        pen.ellipse([(left, top), end], fill=_RIGHT)
        pen.line([(left + 3, top + 7), (left + 6, top + 10), (left + 11, top + 4)], fill="white", width=2)
    else:
        pen.rectangle([(left, top), end], fill=_WRONG)
        pen.line([(left + 4, top + 4), (left + 10, top + 10)], fill="white", width=2)
        pen.line([(left + 10, top + 4), (left + 4, top + 10)], fill="white", width=2)


def _write(pen: "ImageDraw", font: Any, at: tuple[int, int], text: str, colour: str) -> None:
    """Write a line of text, shortened to the width of the picture above it; `at` is its left upper corner in pixels."""
    room = _SIDE - (at[0] - _GAP) % (_SIDE + _GAP)
    short = text
    while short and pen.textlength(short, font=font) > room:
        short = f"{short.rstrip('.')[:-1]}..." if len(short) > 4 else ""
    pen.text(at, short, fill=colour, font=font)
