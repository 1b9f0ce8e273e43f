import json

import pytest

from offsite.storage.strict_json import strict_json


@pytest.mark.parametrize("raw", [b'{"a": [1, 2.5, null, true, "x"]}', b"[]", b'"x"', b"1e300", b"-1" + b"0" * 30])
def test_strict_json_is_json(raw: bytes) -> None:
    assert strict_json(raw) == json.loads(raw)


@pytest.mark.parametrize(
    "raw", [b'{"a": {"b": 1, "b": 2}}', b"NaN", b"-Infinity", b"1e999", b"\xff", b"{", b"[" * 9999, b"9" * 41]
)
def test_strict_json_is_strict(raw: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  whatever it says
        strict_json(raw)
