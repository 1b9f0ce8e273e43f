"""Writes the log of a tuning as TensorBoard scalars, from the same records as the JSONL log."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from offsite.errors import UsageError
from offsite.extras import require
from offsite.storage.files import storage_errors
from offsite.training.run_log import Write, run_folder

_TAGS = {"step": "train", "validation": "validation"}  # tags of the scalars by event; other events have none
_NO_SCALARS = ("event", "step", "time")  # fields of a record that are not scalars


def require_tensorboard() -> Any:
    """Import the class that writes TensorBoard's event files.

    Raises:
        UsageError: tensorboard is not installed.
    """
    return require("torch.utils.tensorboard", "tensorboard", "writing for TensorBoard").SummaryWriter


def require_apart(folder: Path, out: Path) -> None:
    """Refuse a TensorBoard folder that is inside the folder of the return or of its resume points.

    Args:
        folder: the TensorBoard folder.
        out: the folder of the return.

    Raises:
        UsageError: the TensorBoard folder is inside one of these.
    """
    if any(folder.resolve().is_relative_to(taken) for taken in (out.resolve(), run_folder(out))):
        raise UsageError(
            f"{folder} is in the folder of the return or of its run",
            next_step="name another folder with --tensorboard",
        )


@contextlib.contextmanager
def tensorboard_log(folder: Path | None) -> Iterator[Write]:
    """Context manager: writes log records to a folder that TensorBoard reads.

    A resumed run continues the same curves: points that the interrupted run wrote after its last resume point are
    hidden.

    Args:
        folder: the TensorBoard folder, created if it does not exist; with None nothing is written.

    Yields:
        A function that takes the records of the JSONL log. The first record must hold the step at which the run starts.

    Raises:
        UsageError: tensorboard is not installed.
        StorageError: the folder cannot be written.
    """
    if folder is None:
        yield lambda record: None
        return
    kind = require_tensorboard()
    writers: list[Any] = []

    def write(record: Mapping[str, Any]) -> None:
        with storage_errors(folder):
            if not writers:
                writers.append(kind(log_dir=str(folder), purge_step=record["step"] + 1))
            tag = _TAGS.get(record["event"])
            for name, value in record.items():
                if tag and name not in _NO_SCALARS:
                    writers[0].add_scalar(f"{tag}/{name}", value, record["step"])
            if record["event"] == "validation":
                writers[0].flush()

    try:
        yield write
    finally:
        for writer in writers:
            with storage_errors(folder):
                writer.close()
