"""The owner's calibration text."""

from pathlib import Path

import pytest

from tiny import TEXT


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of 120 paragraphs."""
    file = tmp_path / "calibration.txt"
    words = " ".join(TEXT).split()
    file.write_text("\n\n".join(" ".join(words[i % 40 :] + words[: i % 7]) for i in range(120)))
    return file
