"""Types of settings that several verbs share: choices, and lists that are written with commas on the command line."""

from typing import Annotated, Literal

from pydantic import Field

from offsite.config.spec import FILE_ONLY

Method = Literal["lora", "full", "bitfit", "bottleneck"]
Dtype = Literal["bf16", "fp32"]
LongRows = Annotated[
    Literal["error", "truncate", "skip"], Field(description="what happens to rows over max_length"), FILE_ONLY
]
Workers = Annotated[
    int | None,
    Field(ge=0, le=64, description="images: processes that decode and crop; left out: 0 on a CPU, else several"),
    FILE_ONLY,
]


def split_parts(value: object) -> object:
    """Split "0,0.5,1" into a list of its parts; return any other value unchanged, for pydantic to check."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def split_steps(value: object) -> object:
    """Split "refit,distill" into a list of its words; "none" gives an empty one."""
    words = split_parts(value)
    return () if words in (["none"], []) else words


def split_numbers(value: object) -> object:
    """Split "0,14,29" into a list of integers; a part that is not a number stays text, for pydantic to refuse."""
    parts = split_parts(value)
    if not isinstance(value, str) or not isinstance(parts, list):
        return value
    return [int(part) if part.isdecimal() else part for part in parts]
