"""Types of settings that several verbs share, and functions that split lists written with commas into their parts."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from offsite.config.spec import FILE_ONLY
from offsite.spelling import nearest

Method = Literal["lora", "full", "bitfit", "bottleneck"]
Dtype = Literal["bf16", "fp32"]
LongRows = Annotated[Literal["error", "truncate", "skip"], Field(description="what happens to rows over max_length")]
COLUMN_NAMES = (  # our names of fields of a row or a picture, for which a data set may have other names
    *("text", "prompt", "completion", "messages", "instruction", "input", "output", "system", "history", "tools"),
    *("question", "choices", "answer", "chosen", "rejected", "image", "path", "label"),
)


def split_columns(value: object) -> object:
    """Split "prompt=question,completion=answer" into {field: column}; return a value that is not text unchanged."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    if any(not sign or not theirs.strip() for _, sign, theirs in pairs):
        raise ValueError("expected FIELD=COLUMN, such as prompt=question,completion=answer")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def _require_known_columns(columns: dict[str, str] | None) -> dict[str, str] | None:
    """Validator: raise ValueError if a key is not one of COLUMN_NAMES; None (not set) is valid."""
    if unknown := sorted(set(columns or ()) - set(COLUMN_NAMES)):
        meant = [f"did you mean {close!r}?" for name in unknown if (close := nearest(name, COLUMN_NAMES))]
        listed = f"the fields are {', '.join(COLUMN_NAMES)}"
        raise ValueError(f"no field is called {', '.join(unknown)}; {' '.join([*meant, listed])}")
    return columns


Columns = Annotated[
    dict[str, str] | None,
    BeforeValidator(split_columns),
    AfterValidator(_require_known_columns),
    Field(
        description="what the data set calls the fields of a row or a picture",
        examples=["prompt=question,completion=answer", "image=img,label=fine_label"],
    ),
]
Chosen = Annotated[bool, Field(description="from rows with a chosen and a rejected answer, use the chosen answer")]
Workers = Annotated[
    int | None,
    Field(ge=0, le=64, description="images: processes that decode and crop; left out: 0 on a CPU, else several"),
    FILE_ONLY,
]


def split_parts(value: object) -> object:
    """Split "0,0.5,1" into a list of its parts; return any other value unchanged, for pydantic to check."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def split_steps(value: object) -> object:
    """Split "refit,distill" into a list of names of healing steps; "none" becomes an empty tuple."""
    words = split_parts(value)
    return () if words in (["none"], []) else words


def split_numbers(value: object) -> object:
    """Split "0,14,29" into integers; a part that is not a number remains a string, which pydantic refuses."""
    parts = split_parts(value)
    if not isinstance(value, str) or not isinstance(parts, list):
        return value
    return [int(part) if part.isdecimal() else part for part in parts]
