"""The settings in a model's folder: what may stand in them is checked before any library reads them. Torch-free."""

from pathlib import Path
from typing import Any

from offsite.errors import IncompatibleError, StorageError, UsageError
from offsite.models.architectures import ARCHITECTURES
from offsite.models.modules.declared import Declared, unwrapped
from offsite.storage.safetensors_files import strict_json

ADAPTER_CONFIG = "adapter_config.json"
# Keys by which a config runs foreign code, or has transformers read another file than the checkpoint's.
_FOREIGN_KEYS = frozenset({"auto_map", "custom_pipelines", "transformers_weights", "custom_generate", "kernel_config"})


def model_settings(folder: Path) -> dict[str, Any]:
    """The config of a model folder that may be loaded.

    Raises:
        UsageError: there is none.
        StorageError: it cannot be read.
        IncompatibleError: the folder asks for foreign code, or holds an adapter.
    """
    check_folder(folder)
    return read_settings(folder / "config.json")


def check_folder(folder: Path) -> None:
    """Refuse what would run foreign code, reach outside the folder, or silently load something else."""
    config = folder / "config.json"
    if not config.exists():
        tuned = any(folder.glob("*.safetensors"))  # a return, or a plug-in of the form adapter
        raise UsageError(
            f"{folder} holds no config.json, so it is no checkpoint",
            next_step="name a base, bundle or merged plug-in folder"
            + (f"; an adapter goes with its model: `offsite eval MODEL --adapter {folder}`" if tuned else ""),
        )
    settings = read_settings(config)
    family = ARCHITECTURES.get(str(settings.get("model_type")))
    problems = family.strays(settings) if family else []
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "preprocessor_config.json"):
        file = folder / name
        if file.exists():
            problems += [f"{name} has {found}" for found in foreign_settings(read_settings(file))]
    if (folder / ADAPTER_CONFIG).exists():
        problems.append(f"{ADAPTER_CONFIG} lies beside the checkpoint, and transformers would load that adapter too")
    if problems:
        raise IncompatibleError(
            f"{folder} is no plain checkpoint",
            reasons=problems,
            next_step="take these out if you know where they come from; models that need their own code do not work",
        )


def read_settings(file: Path) -> dict[str, Any]:
    """A JSON object of a folder.

    Raises:
        StorageError: it cannot be read, or is no JSON object.
    """
    try:
        content = strict_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot read {file}", reasons=[str(error)], next_step="fetch the file again") from None
    if not isinstance(content, dict):
        raise StorageError(f"{file} is not a JSON object", next_step="fetch the file again")
    return content


def foreign_settings(settings: object, path: str = "") -> list[str]:
    """What in settings runs foreign code, or reads other files than the folder's.

    Args:
        settings: a JSON value.
        path: where it stands in its file, with a dot behind it.
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


def unwrapped_config(folder: Path) -> tuple[dict[str, Any], Declared | None]:
    """The family's config of a folder, and what its emulator declares."""
    try:
        return unwrapped(read_settings(folder / "config.json"))
    except ValueError as problem:
        raise IncompatibleError(
            f"{folder} has a config that cannot be read",
            reasons=[str(problem)],
            next_step="ask the party that it came from for it again",
        ) from None
