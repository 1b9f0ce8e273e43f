from pathlib import Path

import pytest
import torch

from offsite.core import resume
from offsite.core.resume import RunState


def step_of(state: RunState) -> int:
    found = state.load()
    assert found is not None
    return found[0]


def test_a_step_is_saved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = RunState(tmp_path / "run", {}, resume=False)
    state.save(3, {"weight": torch.zeros(2)})
    before = {file.name: file.read_bytes() for file in state.folder.iterdir()}

    def interrupted(*args: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(resume, "write_safetensors", interrupted)
    state.save(3, {"weight": torch.zeros(2)})
    assert {file.name: file.read_bytes() for file in state.folder.iterdir()} == before
    assert step_of(state) == 3


def test_a_resume_point_that_is_cut_off_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = RunState(tmp_path / "run", {}, resume=False)
    state.save(3, {"weight": torch.zeros(2)})

    def cut(file: Path, tensors: object) -> None:
        file.write_bytes(b"half")
        raise RuntimeError

    monkeypatch.setattr(resume, "write_safetensors", cut)
    with pytest.raises(RuntimeError):
        state.save(4, {"weight": torch.ones(2)})
    assert {file.name for file in state.folder.iterdir()} == {"run.json", "state.json", "state-3.safetensors"}
    assert step_of(state) == 3
