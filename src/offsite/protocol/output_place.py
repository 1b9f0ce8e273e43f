"""Checks the path of a result before any work: it is free, and not inside a folder that it would change. Torch-free."""

import shlex
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from offsite.errors import OffsiteError, UsageError
from offsite.protocol.manifest import MANIFEST
from offsite.protocol.verify import read_unverified
from offsite.storage.checkpoint_folder import DECLARED_INDEX, DECLARED_WEIGHTS, INDEX, WEIGHTS
from offsite.storage.files import require_free

_WEIGHTS = (WEIGHTS, INDEX, DECLARED_WEIGHTS, DECLARED_INDEX)
_ADAPTER_CONFIG, _RUN = "adapter_config.json", "run.json"
_RUN_FILES = (".log.jsonl", ".run")  # ends of the paths that a run writes next to its result


def require_place(out: Path, *inputs: Path | Sequence[Path] | None, flag: str = "--out") -> None:
    """Check that a result's folder is free, and not inside a bundle, a model, a run or the data.

    Args:
        out: the folder of the result; it must not exist, or must be empty.
        inputs: the folders and files that the command reads; None and patterns are permitted.
        flag: the command-line flag that sets `out`; the advice in the error names it.

    Raises:
        UsageError: the folder is not free, is one of the inputs or inside one, or is inside a signed folder, a model or
            an interrupted run.
    """
    given = _paths(inputs)
    if (same := next((path for path in given if _same(out, path)), None)) is not None:
        raise UsageError(
            f"{out} is {_called(same)} that the command reads, so it cannot take the result",
            next_step=f"name a new folder: {flag} {shlex.quote(str(_free_sibling(out)))}",
        )
    require_outside(out, *given, flag=flag)
    require_free(out, flag=flag)


def require_outside(out: Path, *inputs: Path | Sequence[Path] | None, flag: str = "--out") -> None:
    """Check that a file or folder is not inside a bundle, a model, a run or the data, which it would change.

    Args:
        out: the file or folder that would be written.
        inputs: the folders and files that the command reads; None and patterns are permitted.
        flag: the command-line flag that sets `out`; the advice in the error names it.

    Raises:
        UsageError: the path is inside one of them.
    """
    given = _paths(inputs)
    around = [folder for folder in out.resolve().parents if kind_of_folder(folder)]
    data = [folder for path in given if (folder := path.resolve()) in out.resolve().parents and path.is_dir()]
    if outer := min({*around, *data}, key=lambda folder: len(folder.parts), default=None):
        raise UsageError(
            f"{out} is inside {_called(outer)} {outer}, which it would change",
            next_step=f"name a place outside: {flag} {shlex.quote(str(_free_sibling(outer, out.name)))}",
        )
    for pattern in given:
        if not pattern.exists() and _would_match(pattern, out):
            elsewhere = _free_sibling(out.resolve().parent, out.name)
            raise UsageError(
                f"what is written at {out} would become a part of the data {pattern}",
                next_step=f"name a place in another folder: {flag} {shlex.quote(str(elsewhere))}",
            )


def kind_of_folder(folder: Path) -> str | None:
    """The kind of a folder, such as "bundle", "model", "adapter" or "run" (an interrupted one); None if unknown."""
    if (folder / MANIFEST).is_file():
        try:
            return read_unverified(folder).kind
        except OffsiteError:
            return "signed folder"
    if (folder / "config.json").is_file() and any((folder / name).is_file() for name in _WEIGHTS):
        return "model"
    if (folder / _ADAPTER_CONFIG).is_file():
        return "adapter"
    return "run" if folder.name.endswith(".run") and (folder / _RUN).is_file() else None


def _called(path: Path) -> str:
    """What a path is, in words for an error: "the bundle", "the folder", "the file" and others."""
    kind = kind_of_folder(path)
    return f"the {kind}" if kind else "the folder" if path.is_dir() else "the file"


def _paths(inputs: Iterable[Path | Sequence[Path] | None]) -> list[Path]:
    """All paths of the inputs, as one list without None."""
    return [path for one in inputs if one is not None for path in ([one] if isinstance(one, Path) else one)]


def _same(out: Path, other: Path) -> bool:
    """Whether `other` exists and both paths lead to the same place."""
    return other.exists() and out.resolve() == other.resolve()


def _would_match(pattern: Path, out: Path) -> bool:
    """Whether a pattern of --data would match the path `out`, or the log or the resume points of the run of `out`."""
    names = [out.name, *(out.name + end for end in _RUN_FILES)]
    return pattern.parent.resolve() == out.resolve().parent and any(fnmatch(name, pattern.name) for name in names)


def _free_sibling(folder: Path, name: str | None = None) -> Path:
    """A path that does not exist yet, in the parent of `folder`.

    Its last part is `name`; with None it is the name of `folder` with "-2". If that path exists, a number is added.
    """
    place = folder.resolve().parent
    stem = name or f"{folder.resolve().name}-2"
    tried = (place / (stem if number == 1 else f"{stem}-{number}") for number in range(1, 1000))
    return next(path for path in tried if not path.exists() and not path.is_symlink())
