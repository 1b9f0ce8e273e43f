from pathlib import Path

import pytest
import torch

from offsite.errors import UsageError
from offsite.storage.lock import LOCK
from offsite.training import resume_points
from offsite.training.resume_points import ResumePoint, RunState
from offsite.training.run_log import log_file, run_folder


def step_of(state: RunState) -> int:
    found = state.load()
    assert found is not None
    return found.step


def test_a_step_is_saved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = RunState(tmp_path / "run", {}, resume=False)
    state.save(ResumePoint(3, {"weight": torch.zeros(2)}))
    before = {file.name: file.read_bytes() for file in state.folder.iterdir()}

    def interrupted(*args: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(resume_points, "write_safetensors", interrupted)
    state.save(ResumePoint(3, {"weight": torch.zeros(2)}))
    assert {file.name: file.read_bytes() for file in state.folder.iterdir()} == before
    assert step_of(state) == 3


def test_a_resume_point_that_is_cut_off_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = RunState(tmp_path / "run", {}, resume=False)
    state.save(ResumePoint(3, {"weight": torch.zeros(2)}))

    def cut(file: Path, tensors: object) -> None:
        file.write_bytes(b"half")
        raise RuntimeError

    monkeypatch.setattr(resume_points, "write_safetensors", cut)
    with pytest.raises(RuntimeError):
        state.save(ResumePoint(4, {"weight": torch.ones(2)}))
    assert {file.name for file in state.folder.iterdir()} == {"run.json", "state.json", "state-3.safetensors"}
    assert step_of(state) == 3


@pytest.mark.parametrize("again", [False, True])
def test_a_run_without_a_resume_point_may_be_begun_anew(tmp_path: Path, again: bool) -> None:
    RunState(tmp_path / "run", {"lr": 1}, resume=False, restartable=True)
    for name in ("memory.json", LOCK):
        (tmp_path / "run" / name).write_text("{}")
    RunState(tmp_path / "run", {"lr": 2}, resume=again, restartable=True)
    assert {file.name for file in (tmp_path / "run").iterdir()} == {"run.json", LOCK}
    with pytest.raises(UsageError, match="interrupted run"):
        RunState(tmp_path / "run", {"lr": 2}, resume=False)


def test_what_a_run_made_before_its_first_resume_point_is_used_again(tmp_path: Path) -> None:
    RunState(tmp_path / "run", {"lr": 1}, resume=False, restartable=True)
    (tmp_path / "run" / "features.bin").write_bytes(b"long work")
    RunState(tmp_path / "run", {"lr": 1}, resume=True, restartable=True)
    assert (tmp_path / "run" / "features.bin").exists()


def test_the_run_and_the_log_of_the_folder_one_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "return").mkdir()
    monkeypatch.chdir(tmp_path / "return")
    assert run_folder(Path()) == tmp_path / "return.run"
    assert log_file(Path()) == tmp_path / "return.log.jsonl"
