"""Importing a GGUF file: transformers dequantises it; what it would leave out is refused or put right here."""

from pathlib import Path

from offsite.config import Dtype
from offsite.extras import require
from offsite.model_owner.importing.by_transformers import load_and_save
from offsite.model_owner.importing.import_record import ImportRecord
from offsite.models.hugging_face_calls import quiet


def import_gguf(source: Path, folder: Path, dtype: Dtype) -> ImportRecord:
    """Write the model in a GGUF file as a base folder.

    Args:
        source: the file.
        folder: the folder that becomes the base.
        dtype: dtype of the written weights.

    Raises:
        UsageError: the package gguf is not installed.
        StorageError: the file is damaged.
        IncompatibleError: the model is not supported.
    """
    require("gguf", "gguf", "reading a GGUF file")
    with quiet():
        load_and_save(source.parent, folder, dtype, gguf_file=source.name)
    return ImportRecord()
