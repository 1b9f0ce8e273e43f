import tempfile
from pathlib import Path
from typing import Any

import pytest

from offsite.errors import IncompatibleError
from offsite.study.doctor import self_test
from offsite.study.doctor.self_test import run_self_test


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_whole_chain_runs_and_nothing_stays(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "has_matrix_tiles", lambda: False)
    monkeypatch.setattr(self_test, "has_bf16_vectors", lambda: False)
    stages: list[str] = []
    facts, findings = run_self_test(lambda event: stages.append(event.stage))
    assert findings == []
    assert list(facts["seconds"]) == ["make keys", "make a tiny model", "pack", "verify", "tune", "plug in"]
    assert stages == [f"self-test: {name}" for name in facts["seconds"]]
    assert facts["kernels"]["backend"] in ("cpu", "cuda", "reference")
    assert not list(scratch.glob("offsite-*"))


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (IncompatibleError("it does not fit", reasons=["a reason"], next_step="x"), 4, "it does not fit; a reason"),
        (RuntimeError("a library broke"), 1, "RuntimeError: a library broke"),
        (ImportError("libfoo.so"), 1, "libfoo.so"),
    ],
)
def test_a_step_that_fails_is_a_problem(
    error: Exception, code: int, says: str, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(self_test, "pack", fail)
    facts, (found,) = run_self_test()
    assert (found.level, found.exit_code) == ("problem", code)
    assert "failed at 'pack'" in found.what
    assert says in found.what
    assert "make keys" in facts["seconds"]
    assert not list(scratch.glob("offsite-*"))


@pytest.mark.every_form
def test_an_adapter_without_effect_is_a_problem(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the chain is for is checked, and not only that nothing raised."""
    score = type("Score", (), {"loss": 1.0})
    monkeypatch.setattr(self_test, "evaluate", lambda *_, **__: score)
    _, (found,) = run_self_test()
    assert "expected a lower one" in found.what


def test_kernels_that_could_be_compiled_are_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    report = {"pieces": [{"name": "compiled kernels", "count": 0, "reason": "they were not compiled when ..."}]}
    monkeypatch.setattr(self_test, "has_matrix_tiles", lambda: True)
    (found,) = self_test._about_kernels(report)
    assert found.level == "advice"
    report["pieces"][0]["count"] = 3
    assert list(self_test._about_kernels(report)) == []
