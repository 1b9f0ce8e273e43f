"""Resume points of a long run: safetensors and JSON in a folder next to the result, never a pickle.

The folder `<out>.run/` of a run that writes `<out>` holds `run.json` (the run's settings and data), `state.json` (the
number of finished steps, the settings of the optimiser's groups, and the name of the tensor file) and the tensor file
(fp32 weights, the optimiser's state and random states). The folder never leaves this machine, only this user can read
it, and it is removed after the result is written.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offsite.errors import StorageError
from offsite.models.torch_tensors import read_tensor
from offsite.storage.files import discard_folder, private_folder, replace_file, storage_errors
from offsite.storage.leftovers import delete_command
from offsite.storage.lock import LOCK
from offsite.storage.safetensors_files import NewTensor, read_header, write_safetensors
from offsite.storage.staging_claims import sweep
from offsite.training.run_identity import RUN, read_record, require_same_run
from offsite.training.run_log import require_resume_asked

_NAMES = {torch.float32: "F32", torch.uint8: "U8"}


@dataclass(frozen=True)
class ResumePoint:
    """The state of a run between two steps, from which the run can continue."""

    step: int  # the number of steps that are done
    tensors: Mapping[str, torch.Tensor]
    groups: Sequence[Mapping[str, Any]] = ()  # settings of the optimiser's parameter groups, as JSON values


class RunState:
    """The folder with the resume points of one run.

    Args:
        folder: the folder, from `offsite.training.run_log.run_folder`.
        identity: settings, model and data of the run, by name. A run is only resumed with exactly the same identity.
        resume: whether to continue the run in the folder. If False, a run in the folder is an error.
        restartable: whether a run without a resume point may be replaced by a new one; False for a run that also keeps
            work in other files.

    Raises:
        UsageError: the folder holds a run, and `resume` is False or its identity differs.
        StorageError: the folder cannot be written or read.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, resume: bool, restartable: bool = False) -> None:
        self.folder = folder
        sweep(folder)
        private_folder(folder)
        self._record, self._restartable = folder / "state.json", restartable
        described = json.loads(json.dumps(identity))
        if require_resume_asked(folder, resume=resume, restartable=restartable):
            require_same_run(folder, described)
        elif (folder / RUN).exists() and (not resume or read_record(folder / RUN) != described):
            self._remove_files()
        replace_file(folder / "run.json", json.dumps(described, indent=1).encode(), mode=0o600)

    def removal(self) -> str:
        """The end of advice to start again with other settings: how to remove this run; empty if that is not needed."""
        return "" if self._restartable and not self._record.exists() else _removal(self.folder)

    def _remove_files(self) -> None:
        """Remove all files of the folder except its lock."""
        with storage_errors(self.folder):
            for file in self.folder.iterdir():
                if file.is_file() and file.name != LOCK:  # held by this process
                    file.unlink()

    def save(self, point: ResumePoint) -> None:
        """Write a resume point. The previous one is removed only after the new one is complete.

        If the folder already holds a resume point of the same step, nothing is written.

        Raises:
            StorageError: the resume point cannot be written; the previous one is still valid.
        """
        file = self.folder / f"state-{point.step}.safetensors"
        record = json.dumps({"step": point.step, "file": file.name, "groups": [*point.groups]}).encode()
        temporary = self.folder / "state.tmp"
        with storage_errors(file):
            if file.exists() and self._record.exists() and self._record.read_bytes() == record:
                return  # already complete; writing it again could be interrupted
            temporary.unlink(missing_ok=True)
            try:
                write_safetensors(temporary, [to_new_tensor(name, tensor) for name, tensor in point.tensors.items()])
                temporary.chmod(0o600)
                temporary.replace(file)
            finally:
                temporary.unlink(missing_ok=True)
        replace_file(self._record, record, mode=0o600)
        with contextlib.suppress(OSError):  # old resume points do no harm, they only need space
            for old in self.folder.glob("state-*.safetensors"):
                if old != file:
                    old.unlink()

    def load(self) -> ResumePoint | None:
        """Read the last resume point; None if none was saved yet.

        Raises:
            StorageError: the resume point is damaged.
        """
        if not self._record.exists():
            return None
        record = read_record(self._record)
        step, name, groups = record.get("step"), record.get("file"), record.get("groups")
        if type(step) is not int or name != f"state-{step}.safetensors" or not isinstance(groups, list):
            raise StorageError(
                f"{self._record} is damaged, or of an earlier version",
                next_step=f"remove the run and start again: {delete_command([self.folder])}",
            )
        held = read_header(self.folder / name)
        return ResumePoint(step, {key: read_tensor(tensor) for key, tensor in held.items()}, groups)

    def remove(self) -> None:
        """Remove the folder of the run. Errors are ignored, since the result is already written."""
        discard_folder(self.folder)

    @property
    def resumable(self) -> bool:
        """Whether a resume point was saved."""
        return self._record.exists()


def to_new_tensor(name: str, tensor: torch.Tensor) -> NewTensor:
    """Describe a torch tensor (fp32 or uint8) for `write_safetensors`."""
    array = tensor.detach().cpu().contiguous()
    return NewTensor(name, _NAMES[array.dtype], tuple(array.shape), lambda: [array.numpy().tobytes()])


def removal_of(folder: Path) -> str:
    """As `RunState.removal`, for the folder of a run that a new one may replace while it has no resume point."""
    return _removal(folder) if (folder / "state.json").exists() else ""


def _removal(folder: Path) -> str:
    return f"; first remove this run: {delete_command([folder])}"
