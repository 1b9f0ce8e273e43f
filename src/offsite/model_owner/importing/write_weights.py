"""Write the weights of an imported base, and refuse NaN and infinity by tensor name. Torch-free."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from offsite.data.read_rows import first
from offsite.errors import IncompatibleError
from offsite.storage.checkpoint_folder import write_checkpoint
from offsite.storage.finite import FiniteWatch
from offsite.storage.safetensors_files import NewTensor


def write_weights(folder: Path, tensors: Iterable[NewTensor], source: Path) -> None:
    """Write tensors as the checkpoint of a base folder, and search them for NaN and infinity at the same time.

    Raises:
        IncompatibleError: tensors hold NaN or infinity; `source` is named in the error.
    """
    watch = FiniteWatch()
    write_checkpoint(folder, watch.over(tensors))
    require_finite(watch.found, source)


def require_finite(bad: Sequence[str], source: Path) -> None:
    """Raise an error if `bad` lists names of tensors, which hold NaN or infinity.

    Raises:
        IncompatibleError: the list is not empty; all names are listed.
    """
    if bad:
        raise IncompatibleError(
            f"the weights in {source} hold NaN or infinity",
            reasons=first([f"{name} holds values that are not finite" for name in bad]),
            next_step="fetch the model again; if its published file is so, use an earlier checkpoint of the model",
        )
