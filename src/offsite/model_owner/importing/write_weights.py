"""Writes the weights of an imported base, and raises an error if tensors have NaN or infinity. Torch-free."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from offsite.data.read_rows import first
from offsite.errors import IncompatibleError
from offsite.storage.checkpoint_folder import write_checkpoint
from offsite.storage.finite import FiniteWatch
from offsite.storage.safetensors_files import NewTensor


def write_weights(folder: Path, tensors: Iterable[NewTensor], source: Path) -> None:
    """Write tensors as safetensors files into a base folder, and check that all values are finite.

    Args:
        folder: the base folder.
        tensors: the tensors, whose values are computed when they are written.
        source: the imported file or folder, for the error.

    Raises:
        IncompatibleError: tensors have NaN or infinity; they are listed.
    """
    watch = FiniteWatch()
    write_checkpoint(folder, watch.over(tensors))
    require_finite(watch.found, source)


def require_finite(bad: Sequence[str], source: Path) -> None:
    """Raise an error if the weights of a model have NaN or infinity.

    Args:
        bad: the names of the tensors that have such values.
        source: the model's file or folder, for the error.

    Raises:
        IncompatibleError: `bad` is not empty.
    """
    if bad:
        raise IncompatibleError(
            f"the weights in {source} hold NaN or infinity",
            reasons=first([f"{name} holds values that are not finite" for name in bad]),
            next_step="fetch the model again; if its published file is so, use an earlier checkpoint of the model",
        )
