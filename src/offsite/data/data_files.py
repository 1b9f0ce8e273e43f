"""Finds the files of a data set: a file, a pattern, a folder of shards, a Hugging Face Hub snapshot or a DatasetDict.

A folder may contain several parts (splits). As in Hugging Face datasets, the names of files and sub-folders say which
part they belong to: `train-00000-of-00002.parquet`, `test.jsonl`, `validation/`. Tuning reads the training part,
scoring reads the held-out part.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from offsite.data.file_formats import RECORDS, parse_line
from offsite.data.hub_configs import config_parts, default_config, named_config
from offsite.data.text_files import kind, read_bytes, unreadable
from offsite.errors import DataError
from offsite.storage.files import sha256_of
from offsite.storage.leftovers import is_leftover
from offsite.storage.unicode_names import existing

Part = Literal["train", "held out"]
DataPaths = Path | Sequence[Path]  # one data set, or several whose rows are joined

TRAINING = ("train", "training")
VALIDATION = ("validation", "val", "valid", "dev")
TEST = ("test", "testing", "eval", "evaluation")
_NOT_ROWS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")  # descriptions of a data set
_STATE, _SPLITS = "state.json", "dataset_dict.json"  # files that `save_to_disk` writes
_SHARD = re.compile(r"(^|[-_.])(part|shard|chunk)?[-_.]?\d+([-_.]of[-_.]\d+)?([-_.][0-9a-f]{16,})?$", re.IGNORECASE)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w-]*")
_PATTERN = re.compile(r"[*?\[]")


def paths_of(data: DataPaths) -> list[Path]:
    """The paths of one or several data sets, as a list."""
    return [data] if isinstance(data, Path) else list(data)


def name_of(data: DataPaths) -> str:
    """The name of a data set, or of several joined ones, for error messages."""
    return " + ".join(str(path) for path in paths_of(data))


def files_of(path: Path, part: Part = "train") -> list[Path]:
    """The files that contain the rows of a data set, in order.

    Args:
        path: a file, a folder, or a path whose last part is a pattern such as `train-*.jsonl`.
        part: for a folder with several parts, whether to return the training part or the held-out part.

    Raises:
        DataError: there are no such files, or it is not clear which files are meant.
    """
    path = existing(path)
    if path.is_dir():
        return _in_folder(path, part)
    if (named := named_config(path)) is not None:
        return _of_config(*named, part)
    if not path.exists() and _PATTERN.search(path.name):
        found = sorted(file for file in path.parent.glob(path.name) if file.is_file())
        if not found:
            raise unreadable(path, "no file has such a name")
        return found
    if not path.exists() and _HUB_NAME.fullmatch(str(path)):
        raise DataError(
            f"there is no file or folder {path}; data sets of the Hugging Face hub are not downloaded here",
            next_step=f"hf download --repo-type dataset {path} --local-dir {path.name}, then name that folder",
        )
    return [path]


def data_digest(data: DataPaths) -> str:
    """The SHA-256 digest of one or several data sets.

    It is the digest of the file itself; for a folder, of the names and digests of its files, without what file
    managers leave there; for several files or folders, of their digests.

    Raises:
        DataError: a data set is a pipe or a device, whose content would differ when it is read again.
    """
    digests = [_digest(file) for path in paths_of(data) for file in _digested(path)]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _digested(path: Path) -> list[Path]:
    """The files or the folder that the digest of one data set covers."""
    if (named := named_config(path)) is not None:
        parts = config_parts(*named)
        return [parts] if isinstance(parts, Path) else [file for files in parts.values() for file in files]
    return files_of(path) if _PATTERN.search(path.name) and not path.exists() else [existing(path)]


def _digest(path: Path) -> str:
    """The SHA-256 digest of a file, or of the names and digests of a folder's files.

    Raises:
        DataError: the path is neither a file nor a folder.
    """
    if path.is_file():
        return sha256_of(path)
    if not path.is_dir():
        raise DataError(
            f"{path} is neither a file nor a folder, so it cannot be read again", next_step="write the rows into a file"
        )
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        if any(is_leftover(part) for part in file.relative_to(path).parts):
            continue  # a file manager may write one at any time
        digest.update(f"{file.relative_to(path).as_posix()} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def _in_folder(folder: Path, part: Part) -> list[Path]:
    """The files that contain the rows of one part of a folder.

    Raises:
        DataError: there are no such files, or it is not clear which files are meant.
    """
    folder = _snapshot(folder)
    if (folder / _STATE).exists():
        return _saved_files(folder)
    if (config := default_config(folder)) is not None:
        return _of_config(folder, config, part)
    parts = parts_of(folder)
    if not parts:
        raise unreadable(folder, f"the folder holds no file of rows{_what_it_holds(folder)}")
    chosen = choose_part(parts, part, folder)
    if (chosen[0] / _STATE).exists():
        return _saved_files(chosen[0])
    _require_one_kind(folder, chosen)
    return chosen


def _of_config(folder: Path, config: Mapping[str, Any], part: Part) -> list[Path]:
    """The files of the requested part of a data set, as `config`, an entry of its README, lists them."""
    parts = config_parts(folder, config)
    if isinstance(parts, Path):
        return _in_folder(parts, part) if parts != folder else choose_part(parts_of(folder), part, folder)
    chosen = choose_part(parts, part, folder)
    _require_one_kind(folder, chosen)
    return chosen


def _require_one_kind(folder: Path, files: Sequence[Path]) -> None:
    """Raise DataError if the files have different formats."""
    if len({kind(file) for file in files}) > 1:
        raise unreadable(
            folder,
            f"it holds files of several kinds: {_some(files)}; name one kind, as '{folder}/*{kind(files[0])}'",
        )


def _snapshot(folder: Path) -> Path:
    """The snapshot folder if `folder` is a data set in the cache of Hugging Face Hub; otherwise `folder` itself."""
    snapshots = sorted(folder.glob("snapshots/*/")) if (folder / "snapshots").is_dir() else []
    return snapshots[-1] if len(snapshots) == 1 else folder


def parts_of(folder: Path) -> dict[str, list[Path]]:
    """The parts (splits) of a folder, by name. Each is a list of files, or of folders that `save_to_disk` wrote.

    Files without a part in their names are under the name "".

    Raises:
        DataError: the folder contains several data sets.
    """
    parts: dict[str, list[Path]] = {}
    if (folder / _SPLITS).exists():
        return {entry.name: [entry] for entry in sorted(folder.iterdir()) if (entry / _STATE).exists()}
    for file in record_files(folder):
        parts.setdefault(part_name(file), []).append(file)
    folders = {entry: found for entry in _visible(folder) if entry.is_dir() and (found := _entry(entry))}
    if not parts and len(folders) > 1 and not all(part_role(entry.name) for entry in folders):
        raise unreadable(folder, f"it holds several data sets: {_some(folders)}; name one of them")
    if not parts and len(folders) == 1 and not part_role((only := next(iter(folders))).name):
        return parts_of(only)
    for entry, found in folders.items():
        if part_role(entry.name):
            parts.setdefault(entry.name, []).extend(found)
    return parts


def _entry(folder: Path) -> list[Path]:
    """The sources of rows in a sub-folder: its files, or if it has none the files one level below.

    A sub-folder that `save_to_disk` wrote is itself the only source.
    """
    if (folder / _STATE).exists():
        return [folder]
    return record_files(folder) or [
        file for below in _visible(folder) if below.is_dir() for file in record_files(below)
    ]


def record_files(folder: Path) -> list[Path]:
    """The files of rows directly in a folder. Plain text files are listed only if there are no others."""
    files = [file for file in _visible(folder) if file.is_file() and file.name not in _NOT_ROWS]
    records = [file for file in files if kind(file) in RECORDS]
    return records or [file for file in files if kind(file) == ".txt"]


def _visible(folder: Path) -> Iterator[Path]:
    """The entries of a folder in order of their names, without those that begin with "." or "_"."""
    return (entry for entry in sorted(folder.iterdir()) if not entry.name.startswith((".", "_")))


def part_name(file: Path) -> str:
    """The name of the part (split) in a file's name, without shard numbers; "" if there is none."""
    stem = file.name.removesuffix(".gz").removesuffix(".zst").removesuffix(".bz2").removesuffix(".xz")
    stem = stem[: -len(Path(stem).suffix)] if Path(stem).suffix else stem
    while (shorter := _SHARD.sub("", stem)) != stem:
        stem = shorter
    words = re.split(r"[-_. ]+", stem.casefold())
    if words and part_role(words[0]):
        return stem
    return next((word for word in words if part_role(word)), "")


def part_role(name: str) -> str:
    """The role of a part (split): "train", "validation" or "test"; "" if its name shows no role."""
    word = re.split(r"[-_. ]+", unicodedata.normalize("NFC", name).casefold())[0]
    names = {"train": TRAINING, "validation": VALIDATION, "test": TEST}
    return next((role for role, known in names.items() if word in known), "")


def choose_part(parts: Mapping[str, list[Path]], part: Part, folder: Path) -> list[Path]:
    """The files of the training part or the held-out part. If there is only one part, its files are returned.

    Args:
        parts: the files of each part, by name, from `parts_of`.
        part: the requested part.
        folder: the folder of the parts, for error messages.

    Raises:
        DataError: no part or several parts have the requested role.
    """
    if len(parts) == 1:
        return next(iter(parts.values()))
    roles = ("train", "") if part == "train" else ("validation", "test")
    for role in roles:
        found = [name for name in parts if part_role(name) == role]
        if len(found) == 1:
            return parts[found[0]]
        if found:
            break
    found = found or list(parts)
    what = "training" if part == "train" else "scoring"
    where = parts[found[0]][0]
    example = where if where.is_dir() else where.parent / f"{found[0]}*"
    raise DataError(
        f"it is not clear which part of {folder} is for {what}",
        reasons=[f"it holds {', '.join(repr(name) if name else 'files of no part' for name in parts)}"],
        next_step=f"name the files, with a pattern in quotes: '{example}'",
    )


def _saved_files(folder: Path) -> list[Path]:
    """The Arrow files that `save_to_disk` of Hugging Face datasets wrote, as listed in state.json.

    Raises:
        DataError: state.json does not list the files, or the rows are picked by an index file.
    """
    state = parse_line(read_bytes(folder / _STATE))
    listed = state.get("_data_files") if isinstance(state, dict) else None
    files = [entry.get("filename") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    if not files or any(not isinstance(name, str) or Path(name).name != name for name in files):
        raise unreadable(folder, f"{_STATE} does not list the files of the folder")
    if isinstance(state, dict) and state.get("_indices_files"):
        raise unreadable(folder, "its rows are picked by an index file; call flatten_indices() and save it again")
    return [folder / str(name) for name in files]


def _what_it_holds(folder: Path) -> str:
    """The end of an error message: the names of a folder's entries; empty if it has none."""
    names = [entry.name for entry in _visible(folder)]
    return f", but {_some(names)}" if names else ""


def _some(entries: "Sequence[object] | Mapping[Path, object]") -> str:
    """The first five names, and the number of the others, for error messages."""
    names = [entry.name if isinstance(entry, Path) else str(entry) for entry in entries]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
