"""The family of a model in a folder or a snapshot: the table's row, or one that is read off the model."""

from pathlib import Path

from offsite.models.architectures import ARCHITECTURES, Architecture, architecture_of
from offsite.models.model_folder import Source, unwrapped_config
from offsite.storage.checkpoint_folder import open_checkpoint
from offsite.storage.snapshot import holds_tensors


def family_of_source(source: Source) -> Architecture:
    """The family of a plain checkpoint.

    Raises:
        StorageError: its files cannot be read.
        IncompatibleError: the table has no row of its type, and the parts of the model cannot be identified.
    """
    config, _ = unwrapped_config(source)
    if str(config.get("model_type")) in ARCHITECTURES:
        return architecture_of(config)
    from offsite.models.derive_family import derive_family

    return derive_family(config, _tensor_names(source)).family


def _tensor_names(source: Source) -> list[str]:
    if isinstance(source, Path):
        return list(open_checkpoint(source).tensors)
    return [name for file in source.names() if holds_tensors(file) for name in source.tensors(file)]
