"""The family of a model in a folder or a snapshot: from the table, or derived from the model."""

from pathlib import Path

from offsite.models.families.architectures import ARCHITECTURES, Architecture, architecture_of
from offsite.models.model_folder import Source, unwrapped_config
from offsite.storage.checkpoint_folder import open_checkpoint
from offsite.storage.snapshot import holds_tensors


def family_of_source(source: Source) -> Architecture:
    """The family of a plain checkpoint: from the table or, if its type is not there, derived from the model.

    Raises:
        StorageError: its files cannot be read.
        IncompatibleError: the type is not in the table, and the parts of the model cannot be identified.
    """
    config, _ = unwrapped_config(source)
    if str(config.get("model_type")) in ARCHITECTURES:
        return architecture_of(config)
    from offsite.models.families.derive_family import derive_family

    return derive_family(config, _tensor_names(source)).family


def _tensor_names(source: Source) -> list[str]:
    """The names of all tensors in a model's files."""
    if isinstance(source, Path):
        return list(open_checkpoint(source).tensors)
    return [name for file in source.names() if holds_tensors(file) for name in source.tensors(file)]
