"""The subsets ("configs") of a data set of the Hugging Face hub, as the head of its README.md lists them.

    ---
    configs:
    - config_name: main
      data_files:
      - split: train
        path: "main/train-*.parquet"
    ---

As in Hugging Face datasets, the one that is marked as default, or called "default", or the only one is read; of several
others, one has to be named. See https://huggingface.co/docs/hub/datasets-manual-configuration.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from offsite.data.text_files import unreadable
from offsite.encodings import decode_text
from offsite.errors import DataError

_README = "README.md"
_HEAD_BYTES = 2**20  # of a README that are looked at


def configs_of(folder: Path) -> dict[str, Mapping[str, Any]]:
    """The configs that list their files, by name; empty if the folder has no README.md with such a list."""
    head = _head(folder / _README)
    listed = head.get("configs") if isinstance(head, Mapping) else None
    found = {}
    for config in listed if isinstance(listed, list) else []:
        if isinstance(config, Mapping) and ("data_files" in config or "data_dir" in config):
            found[str(config.get("config_name", "default"))] = config
    return found


def named_config(path: Path) -> tuple[Path, Mapping[str, Any]] | None:
    """The folder and the config that FOLDER/NAME means where no file has that name; None if it means none."""
    if path.exists() or not path.parent.is_dir():
        return None
    config = configs_of(path.parent).get(path.name)
    return (path.parent, config) if config is not None else None


def default_config(folder: Path) -> Mapping[str, Any] | None:
    """The config that is read if none is named; None if the folder lists no configs.

    Raises:
        DataError: there are several, and none is the default.
    """
    configs = configs_of(folder)
    if not configs:
        return None
    marked = [config for config in configs.values() if config.get("default") is True]
    for chosen in (marked, [configs["default"]] if "default" in configs else [], list(configs.values())):
        if len(chosen) == 1:
            return chosen[0]
    raise DataError(
        f"{folder} holds several data sets",
        reasons=[f"its {_README} lists the configs {', '.join(sorted(configs))}"],
        next_step=f"name one of them as {folder / sorted(configs)[0]}",
    )


def config_parts(folder: Path, config: Mapping[str, Any]) -> dict[str, list[Path]] | Path:
    """The files of a config by the name of their split; or the folder that contains them, if it names just that.

    Raises:
        DataError: a pattern has no file, or leads out of the folder.
    """
    inner = config.get("data_dir")
    place = _inside(folder, str(inner)) if inner else folder
    if "data_files" not in config:
        return place
    parts: dict[str, list[Path]] = {}
    for split, pattern in _patterns(config["data_files"]):
        _inside(folder, pattern)
        files = sorted(file for file in place.glob(pattern) if file.is_file())
        if not files:
            raise unreadable(folder, f"its {_README} lists {pattern!r}, and no such file was downloaded")
        known = parts.setdefault(split, [])
        known += [file for file in files if file not in known]
    if not parts:
        raise unreadable(folder, f"its {_README} lists a config without files")
    return parts


def _patterns(data_files: object) -> Iterator[tuple[str, str]]:
    """Yields pairs of split and pattern, from every form that data_files may have."""
    if isinstance(data_files, str):
        yield "train", data_files
    elif isinstance(data_files, Mapping):
        if "path" in data_files:
            data_files = {data_files.get("split", "train"): data_files["path"]}
        for split, paths in data_files.items():
            yield from ((str(split), str(path)) for path in ([paths] if isinstance(paths, str) else paths or []))
    elif isinstance(data_files, list):
        for entry in data_files:
            yield from _patterns(entry)


def _inside(folder: Path, pattern: str) -> Path:
    """The path of a pattern in the folder; DataError if it leads out of the folder."""
    pure = PurePosixPath(pattern)
    if pure.is_absolute() or ".." in pure.parts or "://" in pattern:
        raise unreadable(folder, f"its {_README} lists {pattern!r}, which is not in the folder")
    return folder / pattern


def _head(file: Path) -> object:
    """The YAML between the two lines --- at the start of a README; None if there is none."""
    try:
        with file.open("rb") as stream:
            lines = decode_text(stream.read(_HEAD_BYTES)).splitlines()
    except (OSError, UnicodeError):
        return None
    if not lines or lines[0].strip() != "---" or "---" not in [line.strip() for line in lines[1:]]:
        return None
    import yaml  # transformers depends on it

    try:
        return yaml.safe_load("\n".join(lines[1 : 1 + [line.strip() for line in lines[1:]].index("---")]))
    except yaml.YAMLError:
        return None
