"""Parse JSON that is not trusted: content that two parsers could understand differently is an error. Torch-free."""

import codecs
import json
import math
from typing import Any

_MOST_DIGITS = 40  # of an integer


def strict_json(raw: bytes) -> Any:
    """Parse JSON from UTF-8 bytes, more strictly than `json.loads`.

    Integers of up to 40 digits are accepted, because tokenizers write 10^30 for "no limit".

    Raises:
        ValueError: it is not JSON, is nested too deeply, contains NaN or infinity or an integer with more digits, or an
            object has the same key twice.
    """

    def refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key appears twice")
        return found

    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    def parse_integer(digits: str) -> int:
        if len(digits) > _MOST_DIGITS:  # int and float have limits, and a product of several would be over them
            raise ValueError(f"{digits[:20]}... has {len(digits)} digits")
        return int(digits)

    def parse_finite_float(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):  # 1e999 is JSON, and would come out as infinity
            raise ValueError(f"{digits[:20]} is out of range")
        return value

    if raw.startswith(codecs.BOM_UTF8):
        raise ValueError("it begins with a byte-order mark; save it as UTF-8 without one")
    try:
        return json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=refuse_repeated_keys,
            parse_constant=refuse_constant,
            parse_float=parse_finite_float,
            parse_int=parse_integer,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
