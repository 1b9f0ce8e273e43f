import importlib.metadata
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from offsite.extras import declared_requirements, install_command
from offsite.protocol.home import Home
from offsite.study.doctor import machine, packages
from offsite.study.doctor.finding import Finding, exit_code_of
from offsite.study.doctor.home import examine_home
from offsite.study.doctor.machine import examine_machine, free_disk, free_memory
from offsite.study.doctor.packages import examine_packages

GIB = 2**30


def installed(monkeypatch: pytest.MonkeyPatch, needed: Sequence[str], versions: dict[str, str]) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(packages, "declared_requirements", lambda: list(needed))
    monkeypatch.setattr(importlib.metadata, "version", version)


def test_missing_and_old_packages_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["numpy>=1.26", "torch>=2.6", "peft>=0.17", 'other; python_version < "3"']
    installed(monkeypatch, needed, {"torch": "2.5.1+cu121", "peft": "0.18.0.dev0"})
    versions, _, findings = examine_packages()
    assert [(one.level, one.next_step) for one in findings] == [
        ("problem", "pip install 'numpy>=1.26'"),
        ("problem", "pip install 'torch>=2.6'"),
    ]
    assert "2.5.1+cu121" in findings[1].what
    assert "other" not in versions
    assert versions["numpy"] == "missing"


def test_an_extra_is_installed_if_all_of_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ['onnx>=1.16; extra == "demo"', "pillow>=10; extra == 'demo'", 'pillow>=10; extra == "see"']
    installed(monkeypatch, [*needed, 'ruff; extra == "dev"'], {"pillow": "11.0"})
    _, extras, findings = examine_packages()
    assert extras == {"demo": f"not installed: {install_command('demo')}", "see": "installed"}
    assert findings == []


def test_the_requirements_are_those_of_the_project() -> None:
    """Every extra of pyproject.toml, and its packages here are new enough: the tests run with them."""
    lines = declared_requirements()
    assert any(line.startswith("torch>=") for line in lines)
    assert 'gguf>=0.17; extra == "gguf"' in lines
    _, extras, findings = examine_packages()
    assert findings == []
    assert {"gguf", "data", "study", "vision", "timm", "lm-eval"} <= extras.keys()
    assert "dev" not in extras


def test_the_command_for_an_extra_is_for_this_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    assert install_command("gguf") == f"pip install -e '{root}[gguf]'"
    monkeypatch.setattr("offsite.extras._checkout", lambda: None)
    assert install_command("gguf") == "pip install 'offsite-tuning[gguf]'"


@pytest.mark.parametrize(
    ("build", "driver", "usable", "says"),
    [
        ("12.8", False, False, "whl/cpu"),
        ("12.8", True, False, "a build for CUDA 12.8, cannot use it"),
        (None, True, False, "a build for the CPU alone, cannot use it"),
        (None, False, False, ""),
        ("12.8", True, True, ""),
    ],
)
def test_a_build_of_torch_that_does_not_fit(
    build: str | None, driver: bool, usable: bool, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    monkeypatch.setattr(machine, "has_nvidia_device", lambda: driver)
    found = [f"{one.what}; {one.next_step}" for one in machine._about_torch()]
    assert len(found) == bool(says)
    assert all(says in text for text in found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine with a CPU alone")
@pytest.mark.parametrize(("free", "level"), [(GIB, "advice"), (2**20, "problem"), (100 * GIB, None)])
def test_little_disk(free: int, level: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    facts, findings = examine_machine(tmp_path / "not" / "there")
    about_disk = [one for one in findings if "on the disk of" in one.what]
    assert {one.level for one in about_disk} == ({level} if level else set())
    assert not level or any(str(tmp_path / "not" / "there") in one.what for one in about_disk)
    assert facts["disk_free_bytes"]["home"] == free
    assert facts["device"] == "cpu"
    assert facts["compute_dtype"].startswith(("fp32: ", "bf16: "))


def test_free_memory_is_within_the_limit_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * GIB))
    assert free_memory() == 8 * GIB
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text(f"{GIB}\n")
    assert free_memory() == 8 * GIB
    (tmp_path / "memory.max").write_text(f"{2 * GIB}\n")
    assert free_memory() == GIB
    assert [one.level for one in machine._about_memory(GIB)] == ["advice"]


def test_free_disk_of_a_folder_to_come(tmp_path: Path) -> None:
    assert free_disk(tmp_path / "a" / "b") > 0


def test_a_home_without_a_key_is_no_problem(tmp_path: Path) -> None:
    facts, findings = examine_home(Home(tmp_path / "home"))
    assert facts["key"] is None
    assert [(one.level, exit_code_of([one])) for one in findings] == [("advice", 0)]
    assert not (tmp_path / "home").exists()


def test_a_home_that_cannot_be_written_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    _, findings = examine_home(Home(tmp_path / "not" / "there"))
    assert [(one.level, str(tmp_path) in one.what) for one in findings] == [("problem", True), ("advice", True)]


@pytest.mark.skipif(sys.platform == "win32", reason="has no such permissions")
def test_a_key_that_others_can_read_is_a_problem(tmp_path: Path) -> None:
    home = Home(tmp_path)
    key = home.create_identity("acme").public_key
    facts, findings = examine_home(home)
    assert facts["key"] == f"acme: {key.fingerprint}"
    assert ["trust add" in one.next_step for one in findings] == [True]
    (tmp_path / "key.pem").chmod(0o644)
    (tmp_path / "trusted").mkdir()
    (tmp_path / "trusted" / "other.pub").write_text("no key")
    facts, findings = examine_home(home)
    assert facts["trusted"] is None
    assert [one.level for one in findings] == ["problem", "problem"]
    assert "chmod 600" in findings[0].next_step


def test_the_first_problem_decides() -> None:
    advice = Finding("advice", "a", "b", 5)
    assert exit_code_of([advice]) == 0
    assert exit_code_of([advice, Finding("problem", "a", "b", 4), Finding("problem", "a", "b", 3)]) == 4
