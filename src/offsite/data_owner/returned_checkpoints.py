"""The checkpoints that a return contains: after which steps they are saved, and their files until it is written.

The files of all but the last one are in the run's folder, next to the resume points and already in the format of the
return, so a resumed run has the checkpoints that were saved before.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from offsite.config import TuneSpec
from offsite.errors import OffsiteError, StorageError
from offsite.protocol.contents import checkpoint_file
from offsite.storage.files import replace_file, storage_errors
from offsite.storage.leftovers import delete_command
from offsite.storage.safetensors_files import write_safetensors
from offsite.storage.strict_json import strict_json
from offsite.training.resume_points import removal_of, to_new_tensor
from offsite.training.schedule import checkpoint_steps


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: the run's folder.
        spec: the settings with the number of checkpoints, and whether the return reports their losses.
        steps: the number of steps of the entire run.

    Raises:
        UsageError: the run has fewer steps than checkpoints.
    """

    def __init__(self, folder: Path, spec: TuneSpec, steps: int) -> None:
        self._folder = folder
        self._numbers = {step: number for number, step in enumerate(checkpoint_steps(spec, steps), 1)}
        self._reports = spec.points.report_scores
        self._scores = folder / "scores.json"

    @property
    def earlier(self) -> list[Path]:
        """The files of all checkpoints except the last one, in order."""
        return [self._folder / checkpoint_file(number) for number in list(self._numbers.values())[:-1]]

    @property
    def scores(self) -> tuple[float, ...] | None:
        """The held-out loss of each checkpoint; None if the return does not report losses."""
        if not self._reports:
            return None
        found = self._read_scores()
        return tuple(found[str(number)] for number in self._numbers.values())

    def is_due(self, step: int) -> bool:
        """Whether there is a checkpoint after this number of finished steps."""
        return step in self._numbers

    def save(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Save the weights if this step has a checkpoint. The last checkpoint is not saved: it is the return itself.

        Args:
            step: the number of finished steps.
            tensors: fp32 tensors, by their names in the return.

        Raises:
            StorageError: the weights cannot be written.
        """
        number = self._numbers.get(step)
        if number is None or number == len(self._numbers):
            return
        file = self._folder / checkpoint_file(number)
        with storage_errors(file):
            file.unlink(missing_ok=True)  # left by a run that was interrupted after this step
            write_safetensors(file, [to_new_tensor(name, tensors[name]) for name in sorted(tensors)])
            file.chmod(0o600)

    def score(self, step: int, loss: float) -> None:
        """Save the held-out loss after a step, if that step has a checkpoint and the return reports losses.

        Args:
            step: the number of finished steps.
            loss: the held-out loss.

        Raises:
            OffsiteError: the loss is not finite.
            StorageError: the loss cannot be written.
        """
        if self._reports and step in self._numbers:
            if not math.isfinite(loss):
                raise OffsiteError(
                    f"the held-out loss after step {step} is {loss}, which no return can hold",
                    next_step=f"tune again with a lower --lr, or without --report-scores{removal_of(self._folder)}",
                )
            scores = {**self._read_scores(), str(self._numbers[step]): loss}
            replace_file(self._scores, json.dumps(scores).encode(), mode=0o600)

    def require_saved(self, done: int) -> None:
        """Refuse to continue a run if files of its earlier checkpoints are missing.

        Args:
            done: the number of finished steps.

        Raises:
            StorageError: a file is missing.
        """
        saved: Sequence[int] = [number for step, number in self._numbers.items() if step <= done]
        files = [self._folder / checkpoint_file(number) for number in saved if number < len(self._numbers)]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise StorageError(
                f"the run in {self._folder} has lost checkpoints that it had saved",
                reasons=[f"{name} is missing" for name in missing],
                next_step=f"put them back, or remove the run and start again: {delete_command([self._folder])}",
            )

    def _read_scores(self) -> dict[str, float]:
        """The saved losses, by the number of the checkpoint as text; empty if none was saved.

        Raises:
            StorageError: the file is damaged.
        """
        if not self._scores.exists():
            return {}
        try:
            return dict(strict_json(self._scores.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise StorageError(
                f"cannot read {self._scores}",
                reasons=[str(error)],
                next_step=f"remove the run and start again: {delete_command([self._folder])}",
            ) from None
