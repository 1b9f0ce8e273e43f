"""The checkpoints that a return holds: which steps they are of, and where the earlier ones lie until it is written.

They lie in the run's folder beside the resume points, under the names and in the form in which they are sent, so a
resumed run goes on with those that were taken before.
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
from offsite.storage.safetensors_files import strict_json, write_safetensors
from offsite.training.resume_points import RunState, to_be_written
from offsite.training.schedule import checkpoint_steps


class Checkpoints:
    """The checkpoints of one run.

    Args:
        state: the run's folder.
        spec: how many, and whether their losses go into the return.
        steps: of the whole run.

    Raises:
        UsageError: the run has fewer steps than checkpoints.
    """

    def __init__(self, state: RunState, spec: TuneSpec, steps: int) -> None:
        self._folder = state.folder
        self._numbers = {step: number for number, step in enumerate(checkpoint_steps(spec, steps), 1)}
        self._reports = spec.points.report_scores
        self._scores = state.folder / "scores.json"

    @property
    def earlier(self) -> list[Path]:
        """The files of all checkpoints but the last, in their order."""
        return [self._folder / checkpoint_file(number) for number in list(self._numbers.values())[:-1]]

    @property
    def scores(self) -> tuple[float, ...] | None:
        """The held-out loss of each checkpoint; None where the return is to hold none."""
        if not self._reports:
            return None
        found = self._read_scores()
        return tuple(found[str(number)] for number in self._numbers.values())

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is of this step."""
        return step in self._numbers

    def take(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep the weights after a step; the last checkpoint is the return's own, and is not kept twice.

        Args:
            step: of an earlier checkpoint; at any other one nothing is done.
            tensors: fp32, by the names under which they are returned.

        Raises:
            StorageError: they cannot be written.
        """
        number = self._numbers.get(step)
        if number is None or number == len(self._numbers):
            return
        file = self._folder / checkpoint_file(number)
        with storage_errors(file):
            file.unlink(missing_ok=True)  # of a run that came to this step before, and was interrupted behind it
            write_safetensors(file, [to_be_written(name, tensors[name]) for name in sorted(tensors)])

    def score(self, step: int, loss: float) -> None:
        """Remember the held-out loss after a step, if it goes into the return.

        Raises:
            OffsiteError: it is no finite number.
            StorageError: it cannot be written.
        """
        if self._reports and step in self._numbers:
            if not math.isfinite(loss):
                raise OffsiteError(
                    f"the held-out loss after step {step} is {loss}, which no return can hold",
                    next_step="tune again with a lower --lr, or without --report-scores",
                )
            scores = {**self._read_scores(), str(self._numbers[step]): loss}
            replace_file(self._scores, json.dumps(scores).encode())

    def require_taken(self, done: int) -> None:
        """Refuse to go on with a run whose earlier checkpoints are gone.

        Args:
            done: steps that were done.

        Raises:
            StorageError: one of them is missing.
        """
        taken: Sequence[int] = [number for step, number in self._numbers.items() if step <= done]
        files = [self._folder / checkpoint_file(number) for number in taken if number < len(self._numbers)]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise StorageError(
                f"the run in {self._folder} has lost checkpoints that it had taken",
                reasons=[f"{name} is missing" for name in missing],
                next_step=f"put them back, or remove the run and start anew: rm -r {self._folder}",
            )

    def _read_scores(self) -> dict[str, float]:
        if not self._scores.exists():
            return {}
        try:
            return dict(strict_json(self._scores.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise StorageError(
                f"cannot read {self._scores}",
                reasons=[str(error)],
                next_step=f"remove the run and start anew: rm -r {self._folder}",
            ) from None
