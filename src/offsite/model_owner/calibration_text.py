"""The calibration text before it is tokenised, and what can be said of it without that. Torch-free."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from offsite.config import PackSpec
from offsite.data.picture_sets import read_pictures
from offsite.data.record_files import RECORDS
from offsite.data.rows import read_rows
from offsite.data.text_files import kind, read_text
from offsite.errors import UsageError
from offsite.model_owner.base_model import BaseModel

_LONGEST = 512  # tokens in a sequence, BOS included


def calibration_length(config: Mapping[str, Any]) -> int:
    """Tokens in a sequence of calibration text: 512, or the model's context where that is shorter."""
    context = config.get("max_position_embeddings") or config.get("n_positions") or _LONGEST
    return min(_LONGEST, int(context))


def read_calibration_text(file: Path | None) -> str:
    """The owner's own text or rows, or the text that ships with this package.

    Raises:
        DataError: it cannot be read.
    """
    if file is None:
        return (resources.files("offsite.model_owner") / "calibration.txt").read_text(encoding="utf-8")
    if file.is_dir() or kind(file) in RECORDS:
        return "\n\n".join(row.whole_text for row in read_rows(file))
    return read_text(file)


def require_calibration(model: BaseModel, spec: PackSpec, *, distills: bool) -> None:
    """Refuse calibration text or pictures that cannot be used, as far as that shows without a tokenizer.

    Args:
        model: the base.
        spec: which text, and how many tokens of it.
        distills: whether the emulator is distilled on it too.

    Raises:
        DataError: they cannot be read.
        UsageError: fewer tokens are asked for than one sequence has.
    """
    if model.family.vision is not None:
        if spec.calibration.source is not None:
            read_pictures(spec.calibration.source, labelled=False)
        return
    if spec.calibration.source is not None:
        read_calibration_text(spec.calibration.source)
    for tokens in (spec.calibration.tokens, *([spec.distill.tokens] if distills else [])):
        require_whole_sequence(calibration_length(model.config), tokens)


def require_whole_sequence(length: int, tokens: int) -> None:
    """Refuse to take fewer tokens of calibration text than one sequence has.

    Raises:
        UsageError: it was asked for.
    """
    if tokens < length:
        raise UsageError(
            f"{tokens} tokens of calibration text are asked for, and one sequence has {length}",
            next_step=f"set calibration_tokens, and distill_tokens with --heal distill, to at least {length}",
        )
