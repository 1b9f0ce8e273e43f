"""Checks before a bundle is signed that it can be tuned, because the data owner cannot correct a signed file.

Errors name the base's files and a next step for its owner. `check_settings_of` only reads files, so a plan runs it too;
`open_settings` loads tokenizer or image processor before the long work; `open_bundle` verifies and runs the finished
files.
"""

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from offsite.data.read_rows import first
from offsite.errors import IncompatibleError, OffsiteError, StorageError, UsageError
from offsite.model_owner.base_model import BaseModel
from offsite.models.modules.declared import unwrapped
from offsite.models.tokenizer_files import tokenizer_problems
from offsite.progress import Event, Progress
from offsite.protocol.contents import CONFIG, PROCESSOR, TOKENIZER_CONFIG
from offsite.protocol.home import Home
from offsite.protocol.manifest import BundleManifest
from offsite.protocol.verify import check_unsigned
from offsite.storage.files import Written
from offsite.storage.snapshot import ReadFile, Snapshot
from offsite.storage.strict_json import strict_json

if TYPE_CHECKING:
    import torch

_COPY_TOKENIZER = "copy the tokenizer's files of this very model into the base folder, from where it was published"
_IMPORT_AGAIN = "import the model again with `offsite import MODEL --out base/`"
_STEPS = {  # by kind of problem, see `tokenizer_problems`
    "files": _COPY_TOKENIZER,
    "end token": f'name one as "eos_token" in {TOKENIZER_CONFIG} of the base folder',
    "numbers": _COPY_TOKENIZER,
    "model": _COPY_TOKENIZER,
}


def check_settings_of(model: BaseModel, files: Mapping[str, bytes]) -> None:
    """Check that a bundle's tokenizer or image processor fits its model, by its files alone; no library loads them.

    Args:
        model: the opened base.
        files: the contents of the bundle's files other than weights, keyed by file name.

    Raises:
        IncompatibleError: the bundle could not be tuned.
    """
    source = _as_source(model, files)
    if model.family.vision is not None:
        from offsite.data.pictures.picture_sizes import seen_picture

        with _fault_of(model):
            seen_picture(source, model.family, model.config)
        return
    if problems := tokenizer_problems(source, model.config):
        steps = list(dict.fromkeys(_STEPS[kind] for kind in problems))
        raise IncompatibleError(
            f"the tokenizer in {model.folder} does not fit its model, so a bundle of it could not be tuned",
            reasons=first([problem for kind in problems.values() for problem in kind]),
            next_step="; ".join(steps),
        )


def open_settings(model: BaseModel, files: Mapping[str, bytes]) -> None:
    """Load a bundle's tokenizer or image processor from its files, and prepare some rows or a picture with it.

    Args:
        model: the opened base.
        files: the contents of the bundle's files other than weights, keyed by file name.

    Raises:
        UsageError: an optional package is not installed.
        IncompatibleError: the bundle could not be tuned.
    """
    from offsite.evaluation.first_row import open_inputs

    with _fault_of(model):
        open_inputs(_as_source(model, files), model.family, model.config)


def open_bundle(model: BaseModel, folder: Path, manifest: BundleManifest, home: Home, progress: Progress) -> None:
    """Verify and load a finished bundle as its recipient will, and check that the loss on one row is finite.

    For an image encoder, the features of a picture must be finite.

    Args:
        model: the opened base.
        folder: the temporary folder with all files of the bundle but the manifest.
        manifest: the manifest that will be signed.
        home: the model owner's home.
        progress: receives the progress events.

    Raises:
        UsageError: an optional package is not installed.
        IncompatibleError: the bundle could not be verified or tuned.
    """
    from offsite.evaluation.first_row import first_loss, open_inputs

    progress(Event("opening the bundle as its recipient will", 0))
    with _fault_of(model, folder):
        check_unsigned(folder, manifest, home)
        config, _ = unwrapped(strict_json((folder / CONFIG).read_bytes()))
        inputs = open_inputs(folder, manifest.family, config)
        loss = first_loss(folder, manifest.family, inputs, _stored_dtype(manifest))
    if not math.isfinite(loss):
        what = "features of a picture are" if manifest.family.vision else "loss on a few sentences is"
        raise IncompatibleError(
            f"the bundle's {what} not finite, so it could not be tuned",
            reasons=[f"found {loss}, in {manifest.tensors[next(iter(manifest.tensors))].dtype}"],
            next_step="pack with --dtype fp32 or with other compression; if it is the same, import the model again",
        )


def _stored_dtype(manifest: BundleManifest) -> "torch.dtype":
    import torch

    bf16 = any(entry.dtype == "BF16" for entry in manifest.tensors.values())
    return torch.bfloat16 if bf16 else torch.float32


def _as_source(model: BaseModel, files: Mapping[str, bytes]) -> Snapshot:
    """The bundle's files other than weights, in memory; error messages will name the base's folder."""
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return Snapshot(
        model.folder,
        [Written(name, len(content), digests[name]) for name, content in files.items()],
        {name: ReadFile(len(content), digests[name], content) for name, content in files.items()},
    )


@contextlib.contextmanager
def _fault_of(model: BaseModel, folder: Path | None = None) -> Iterator[None]:
    """Context manager: turn errors of the body into errors about the base, with advice for its owner.

    A UsageError, which is raised if a package is not installed, does not change.

    Args:
        model: the opened base.
        folder: the temporary folder of the bundle, which is replaced by the base's folder in messages; None if the body
            does not use one.
    """
    try:
        yield
    except UsageError:  # a package that is not installed
        raise
    except OffsiteError as error:
        kind = StorageError if isinstance(error, StorageError) else IncompatibleError
        words = [part.replace(str(folder), str(model.folder)) for part in (error.what, *error.reasons)]
        inputs = f"correct {PROCESSOR} in the base folder" if model.family.vision else _COPY_TOKENIZER
        raise kind(
            f"a bundle of this base could not be tuned: {words[0]}",
            reasons=words[1:],
            next_step=_own_step(error) or (inputs if folder is None else _IMPORT_AGAIN),
        ) from None


def _own_step(error: OffsiteError) -> str | None:
    """The advice in an error, if the base's owner can follow it; None if there is none, or only for a recipient."""
    step = error.next_step
    return step if step and not any(word in step for word in ("ask ", "fetch ", "check that the folder")) else None
