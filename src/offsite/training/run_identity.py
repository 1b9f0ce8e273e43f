"""What identifies a run (settings, model and data), and whether a run that is to be resumed is that one. Torch-free."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from offsite.errors import StorageError, UsageError
from offsite.storage.leftovers import delete_command
from offsite.storage.strict_json import strict_json

RUN = "run.json"  # the file in a run's folder with its identity


def read_identity(folder: Path) -> dict[str, Any] | None:
    """What identifies the run whose resume points are in `folder`, by name; None if there is no run.

    Raises:
        StorageError: the file is damaged.
    """
    file = folder / RUN
    return read_record(file) if file.exists() else None


def list_differences(
    saved: Mapping[str, Any], identity: Mapping[str, Any], run: str, without: Collection[str] = ()
) -> list[str]:
    """A line for each setting, model or data set in which a run that is to be resumed differs from the saved one.

    Args:
        saved: what identifies the saved run, by name, as read from JSON.
        identity: what identifies the run that was asked for, by name.
        run: what the saved run is called in the lines, such as "the interrupted run".
        without: names that are not compared.
    """
    asked: Mapping[str, Any] = json.loads(json.dumps(dict(identity)))
    return [
        f"{name}: {_shorten(saved.get(name))} in {run}, {_shorten(asked.get(name))} now"
        for name in sorted((saved.keys() | asked.keys()) - set(without))
        if saved.get(name) != asked.get(name)
    ]


def require_same_run(folder: Path, identity: Mapping[str, Any], without: Collection[str] = ()) -> None:
    """Refuse to resume the run in `folder` if its settings, model or data are not those of `identity`.

    Args:
        folder: the folder with the resume points.
        identity: what identifies the run that was asked for, by name.
        without: names that are not compared.

    Raises:
        UsageError: they differ; the error lists each difference.
        StorageError: the run's files are damaged.
    """
    different = list_differences(read_identity(folder) or {}, identity, "the interrupted run", without)
    if different:
        raise UsageError(
            f"the run in {folder} is another one, so it cannot be resumed",
            reasons=different,
            next_step="give the same settings, model and data, or remove it to start again: "
            f"{delete_command([folder])}",
        )


def read_record(file: Path) -> dict[str, Any]:
    """The content of a JSON file of a run; an empty dictionary if the file holds something other than an object.

    Raises:
        StorageError: the file cannot be read, or is damaged.
    """
    try:
        content = strict_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise StorageError(
            f"cannot read {file}",
            reasons=[str(error)],
            next_step=f"remove the run and start again: {delete_command([file.parent])}",
        ) from None
    return content if isinstance(content, dict) else {}


def _shorten(value: object) -> str:
    """A setting's value for an error message; if it is longer than 40 characters, its first 12."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
