"""Messages between this process and its worker processes: a line of JSON, then bytes. Nothing is pickled."""

import json
from collections.abc import Mapping
from typing import Any, BinaryIO

MOST_BYTES = 2**33  # of one message's content


def send(pipe: BinaryIO | Any, facts: Mapping[str, Any], content: bytes | memoryview = b"") -> None:
    """Write one line of JSON with `facts` and the number of bytes of `content`, then `content`."""
    pipe.write(json.dumps({**facts, "bytes": len(content)}).encode() + b"\n")
    pipe.write(content)
    pipe.flush()


def receive(pipe: BinaryIO | Any, most: int = MOST_BYTES) -> tuple[dict[str, Any], bytes]:
    """Read a message of `send`: its JSON values, and its content of at most `most` bytes.

    Raises:
        EOFError: the pipe was closed.
        ValueError: it is no such message.
    """
    line = pipe.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    facts = json.loads(line)
    if not isinstance(facts, dict) or type(facts.get("bytes")) is not int or not 0 <= facts["bytes"] <= most:
        raise ValueError("no message of a worker process")
    content = pipe.read(facts["bytes"])
    if len(content) != facts["bytes"]:
        raise EOFError
    return facts, content
