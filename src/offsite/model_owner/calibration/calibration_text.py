"""Reads the calibration text, and checks what can be checked without a tokenizer. Torch-free."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from offsite.config import PackSpec
from offsite.data.file_formats import RECORDS
from offsite.data.pictures.picture_sets import read_pictures
from offsite.data.read_rows import read_rows
from offsite.data.row import RowForm
from offsite.data.text_files import kind, read_text
from offsite.errors import UsageError
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.calibration.calibration_pictures import photos

_LONGEST = 512  # tokens in a sequence, BOS included


def calibration_length(config: Mapping[str, Any]) -> int:
    """Number of tokens in one calibration sequence: 512, or the model's context length if that is shorter."""
    context = config.get("max_position_embeddings") or config.get("n_positions") or _LONGEST
    return min(_LONGEST, int(context))


def row_form(spec: PackSpec) -> RowForm:
    """The calibration rows' own names of the fields that offsite reads, such as "prompt", from the settings."""
    return RowForm(spec.calibration.columns or {}, spec.calibration.chosen)


def read_calibration_text(file: Path | None, form: RowForm | None = None) -> str:
    """The text of the owner's file or rows for calibration; if `file` is None, the text that this package contains.

    `form` has the rows' own names of the fields that offsite reads, such as "prompt"; None: they are offsite's names.

    Raises:
        DataError: the file cannot be read.
    """
    if file is None:
        return (resources.files("offsite.model_owner.calibration") / "calibration.txt").read_text(encoding="utf-8")
    if file.is_dir() or kind(file) in RECORDS:
        return "\n\n".join(row.whole_text for row in read_rows(file, form) if not row.left_out)
    return read_text(file)


def require_calibration(model: BaseModel, spec: PackSpec, *, distills: bool) -> None:
    """Raise an error if the calibration data cannot be used; checks that need a tokenizer are not made.

    Args:
        model: the opened base.
        spec: the settings of calibration and distillation.
        distills: whether distillation uses the data too.

    Raises:
        DataError: text or pictures cannot be read.
        UsageError: a number of tokens is less than one sequence; or no pictures were named and scikit-image's are not
            installed.
    """
    if model.family.vision is not None:
        if spec.calibration.source is not None:
            read_pictures(spec.calibration.source, labelled=False, columns=spec.calibration.columns)
        else:
            photos()
        return
    if spec.calibration.source is not None:
        read_calibration_text(spec.calibration.source, row_form(spec))
    for tokens in (spec.calibration.tokens, *([spec.distill.tokens] if distills else [])):
        require_whole_sequence(calibration_length(model.config), tokens)


def require_whole_sequence(length: int, tokens: int) -> None:
    """Raise an error if `tokens` is less than one calibration sequence of `length` tokens.

    Raises:
        UsageError: `tokens` is less than `length`.
    """
    if tokens < length:
        raise UsageError(
            f"{tokens} tokens of calibration text are asked for, and one sequence has {length}",
            next_step=f"set calibration_tokens, and distill_tokens with --heal distill, to at least {length}",
        )
