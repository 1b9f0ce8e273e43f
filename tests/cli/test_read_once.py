"""One command opens each file of weights that it was sent once, and hashes it once."""

import hashlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from artifacts import full_return, lora_return, packed
from offsite.cli import main
from tiny import Parties, tiny_base, tiny_parties, tiny_rows

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
_OPENED: Counter[str] = Counter()


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | bytes | Path):
        _OPENED[str(arguments[0])] += 1


@pytest.fixture(scope="module", autouse=True)
def audited() -> None:
    """Python tells the hook of every file that it opens; hooks stay for as long as the process."""
    sys.addaudithook(_note)


class Counting:
    """A hash that counts the bytes that go into it."""

    def __init__(self, digest: Any, content: bytes) -> None:
        self.digest_of_all, self.length = digest, 0
        self.update(content)

    def update(self, more: Any) -> None:
        self.length += memoryview(more).nbytes
        self.digest_of_all.update(more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.digest_of_all, name)


class Hashes:
    """All contents that were hashed by SHA-256."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counted: list[Counting] = []
        sha256, new = hashlib.sha256, hashlib.new

        def counting(content: bytes = b"", **how: Any) -> Counting:
            self.counted.append(Counting(sha256(**how), content))
            return self.counted[-1]

        def counting_new(name: str, content: bytes = b"", **how: Any) -> Any:
            return counting(content, **how) if name == "sha256" else new(name, content, **how)

        monkeypatch.setattr(hashlib, "sha256", counting)
        monkeypatch.setattr(hashlib, "new", counting_new)

    def of(self, file: Path) -> int:
        """How often the bytes of a file were hashed."""
        counted = [*self.counted]
        expected = hashlib.sha256(file.read_bytes()).hexdigest()
        return sum(one.digest_of_all.hexdigest() == expected for one in counted)


@pytest.fixture(scope="module")
def exchange(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Parties]:
    folder = tmp_path_factory.mktemp("exchange")
    parties = tiny_parties(folder)
    bundle = packed(tiny_base(folder / "base", blocks=4), folder / "bundle", parties, keep=1)
    lora_return(bundle, folder / "lora", parties.data_owner, b=0.01)
    full_return(bundle, folder / "full", parties.data_owner, lambda _, shipped: shipped * 1.01)
    tiny_rows(folder / "rows.jsonl", 8)
    return folder, parties


@pytest.fixture
def hashes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hashes]:
    _OPENED.clear()
    yield Hashes(monkeypatch)
    _OPENED.clear()


def opened(file: Path) -> int:
    return _OPENED[str(file)]


def test_tune(exchange: tuple[Path, Parties], tmp_path: Path, hashes: Hashes) -> None:
    folder, parties = exchange
    words = [folder / "bundle", "--data", folder / "rows.jsonl", "--out", tmp_path / "return", "--max-steps", 1]
    assert main(["tune", *map(str, words), "--home", str(parties.data_owner.folder), "--json"]) == 0
    files = [file for file in (folder / "bundle").iterdir() if not file.name.startswith("offsite.json")]
    assert len(files) >= 3
    for file in files:
        assert (opened(file), hashes.of(file)) == (1, 1), file.name
    returned = tmp_path / "return" / "adapter_model.safetensors"
    assert hashes.of(returned) == 1  # as it was written, and not again


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("lora", ["--as", "adapter", "--strength", "0.5"]),
        ("lora", ["--as", "merged"]),
        ("full", []),
        ("full", ["--choose-on", "rows.jsonl", "--strength", "1.0"]),
    ],
)
def test_plug_in(
    exchange: tuple[Path, Parties], tmp_path: Path, hashes: Hashes, returned: str, words: list[str]
) -> None:
    folder, parties = exchange
    named = [str(folder / word) if word == "rows.jsonl" else word for word in words]
    usual = [folder / "base", folder / returned, "--out", tmp_path / "plugged", "--home", parties.owner.folder]
    assert main(["plug-in", *map(str, usual), *named, "--again", "--json"]) == 0
    files = [file for file in (folder / returned).iterdir() if not file.name.startswith("offsite.json")]
    for file in files:
        assert (opened(file), hashes.of(file)) == (1, 1), file.name
