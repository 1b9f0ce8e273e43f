"""Reads the files of a model from a folder or from a snapshot of verified files. Torch-free.

Settings are checked before any library reads them.
"""

import contextlib
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from offsite.errors import IncompatibleError, StorageError, UsageError
from offsite.models.families.architectures import ARCHITECTURES
from offsite.models.modules.declared import Declared, unwrapped
from offsite.storage.files import storage_errors
from offsite.storage.safetensors_files import StoredTensor, copied, read_header, write_safetensors
from offsite.storage.snapshot import Snapshot, holds_tensors
from offsite.storage.strict_json import strict_json

Source = Path | Snapshot  # where the files of a model, or of an adapter, are taken from
CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
_SETTINGS = (CONFIG, "tokenizer_config.json", "generation_config.json", "preprocessor_config.json")
# Keys by which a config runs foreign code, or has transformers read another file than the checkpoint's.
_FOREIGN_KEYS = frozenset({"auto_map", "custom_pipelines", "transformers_weights", "custom_generate", "kernel_config"})


def folder_of(source: Source) -> Path:
    """The folder of a model's files, for error messages."""
    return source.folder if isinstance(source, Snapshot) else source


def has_file(source: Source, name: str) -> bool:
    """Whether the source has a file with this name."""
    return name in source.names() if isinstance(source, Snapshot) else (source / name).exists()


def read_bytes(source: Source, name: str) -> bytes:
    """The content of a file that contains no weights.

    Raises:
        OSError: the file cannot be read or does not exist.
        VerificationError: the file has changed since it was verified.
    """
    return source.read(name) if isinstance(source, Snapshot) else (source / name).read_bytes()


def tensors_of(source: Source, name: str) -> Mapping[str, StoredTensor]:
    """The tensors of the safetensors file `name`, by tensor name; those of a snapshot are read into memory.

    Raises:
        StorageError: the file is missing, truncated or malformed.
        VerificationError: the file has changed since it was verified.
    """
    return source.tensors(name) if isinstance(source, Snapshot) else read_header(source / name)


@contextlib.contextmanager
def as_folder(source: Source, weights: str | None = None) -> Iterator[Path]:
    """Context manager: yield a folder for libraries that need one: the source's, or a private copy of a snapshot.

    The copy is temporary and has no weights, except the file `weights`.

    Args:
        source: a folder or a snapshot.
        weights: the name of a safetensors file that the copy must also contain; None: no file of weights.

    Raises:
        StorageError: the copy cannot be written.
        VerificationError: a file has changed since it was verified.
    """
    if not isinstance(source, Snapshot):
        yield source
        return
    folder = Path(tempfile.mkdtemp(prefix="offsite-"))  # only this user can read it (mode 0700)
    try:
        with storage_errors(folder):
            for name in source.names():
                if not holds_tensors(name) and not name.endswith(".index.json"):
                    (folder / name).write_bytes(source.read(name))
            if weights is not None:
                write_safetensors(folder / weights, [copied(one) for one in source.tensors(weights).values()])
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def model_settings(source: Source) -> dict[str, Any]:
    """The content of a model's config.json, after `check_settings`.

    Raises:
        UsageError: there is no config.json.
        StorageError: a settings file cannot be read.
        IncompatibleError: the folder asks for foreign code, or contains an adapter.
    """
    check_settings(source)
    return read_settings(source, CONFIG)


def check_settings(source: Source) -> None:
    """Check that no setting of a model would run foreign code or read other files, and that it contains no adapter.

    Raises:
        UsageError: there is no config.json.
        StorageError: a settings file cannot be read.
        IncompatibleError: a setting is refused, or there is an adapter_config.json; all problems are listed.
    """
    folder = folder_of(source)
    if not has_file(source, CONFIG):
        tuned = any(folder.glob("*.safetensors"))  # a return, or a plug-in of the form adapter
        raise UsageError(
            f"{folder} holds no config.json, so it is not a checkpoint",
            next_step="name a base, bundle or merged plug-in folder"
            + (
                f"; an adapter is used with its model: `offsite eval MODEL --adapter {shlex.quote(str(folder))}`"
                if tuned
                else ""
            ),
        )
    settings = read_settings(source, CONFIG)
    family = ARCHITECTURES.get(str(settings.get("model_type")))
    problems = family.strays(settings) if family else []
    for name in _SETTINGS:
        if has_file(source, name):
            problems += [f"{name} has {found}" for found in foreign_settings(read_settings(source, name))]
    if has_file(source, ADAPTER_CONFIG):
        problems.append(f"{ADAPTER_CONFIG} is in the checkpoint's folder, and transformers would load that adapter too")
    if problems:
        raise IncompatibleError(
            f"{folder} is not a plain checkpoint",
            reasons=problems,
            next_step="take these out if you know where they come from; models that need their own code do not work",
        )


def read_settings(source: Source, name: str) -> dict[str, Any]:
    """Read the file `name`, which contains one JSON object.

    Raises:
        StorageError: the file cannot be read, or is not a JSON object.
    """
    file = folder_of(source) / name
    try:
        content = strict_json(read_bytes(source, name))
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot read {file}", reasons=[str(error)], next_step="fetch the file again") from None
    if not isinstance(content, dict):
        raise StorageError(f"{file} is not a JSON object", next_step="fetch the file again")
    return content


def foreign_settings(settings: object, path: str = "") -> list[str]:
    """A message for each setting that would run foreign code or read files outside the folder.

    Args:
        settings: the parsed content of a settings file, or a part of it.
        path: the keys that lead to this part in the file, each followed by a dot.
    """
    found = []
    if isinstance(settings, dict):
        for key, value in settings.items():
            here = f"{path}{key}"
            kernel = "attn_implementation" in key or "experts_implementation" in key
            if key in _FOREIGN_KEYS and value:
                found.append(f"{here}, which runs foreign code or reads other files")
            elif kernel and any(mark in str(value) for mark in "/:\\"):
                found.append(f"{here} = {str(value)[:80]!r}, which fetches foreign code")
            else:
                found += foreign_settings(value, f"{here}.")
    return found


def unwrapped_config(source: Source) -> tuple[dict[str, Any], Declared | None]:
    """The config of a model's family, and the declaration of the emulator's modules (None for a plain checkpoint).

    A bundle has a declaration if modules of its emulator differ from the family's; its config.json contains both.

    Raises:
        StorageError: config.json cannot be read.
        IncompatibleError: the declaration is malformed.
    """
    try:
        return unwrapped(read_settings(source, CONFIG))
    except ValueError as problem:
        raise IncompatibleError(
            f"{folder_of(source)} has a config that cannot be read",
            reasons=[str(problem)],
            next_step="ask the party that it came from for it again",
        ) from None
