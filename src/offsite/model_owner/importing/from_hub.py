"""Downloads a model from the Hugging Face hub into the hub's own cache, without any file that runs code."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from offsite.errors import OffsiteError, UsageError
from offsite.model_owner.importing.check_download import BIN_INDEX, BIN_WEIGHTS
from offsite.progress import Event, Progress, silent
from offsite.protocol.contents import CONFIG, GENERATION_CONFIG, PROCESSOR, TOKENIZER_FILES
from offsite.storage.checkpoint_folder import INDEX, WEIGHTS

PREFIX = "hub:"
_ADDRESS = re.compile(r"(?P<model>[\w.-]+/[\w.-]+)(?:/(?P<file>[\w./-]+\.(?:gguf|onnx)))?(?:@(?P<revision>[\w./-]+))?")
_SETTINGS = (CONFIG, GENERATION_CONFIG, PROCESSOR, *TOKENIZER_FILES, "LICENSE", "LICENSE.txt", "LICENSE.md")
_NO_COPY = (
    "connect to the network; or fetch the model where there is one, with `hf download {model} --local-dir model/`, and "
    "name the folder"
)


@dataclass(frozen=True)
class HubAddress:
    """A model on the hub: its name, a single file of it (None: its checkpoint), and a revision (None: the main one)."""

    model: str
    file: str | None
    revision: str | None


def hub_address(source: Path) -> HubAddress | None:
    """Parse a source such as hub:ORG/NAME, hub:ORG/NAME@REVISION or hub:ORG/NAME/FILE.gguf; None if it is a path.

    Raises:
        UsageError: the text after "hub:" is no such name.
    """
    text = source.as_posix()
    if not text.startswith(PREFIX):
        return None
    match = _ADDRESS.fullmatch(text.removeprefix(PREFIX))
    if match is None:
        raise UsageError(
            f"{text} names no model of the hub",
            reasons=["expected hub:ORG/NAME, with @REVISION or /FILE.gguf behind it where needed"],
            next_step="write it as `offsite import hub:ORG/NAME --out base/`",
        )
    return HubAddress(match["model"], match["file"], match["revision"])


def download_from_hub(address: HubAddress, progress: Progress = silent) -> Path:
    """Download a model into the hub's cache; returns the path of its folder there, or of its single file.

    Only settings, tokenizer and one form of the weights are fetched: safetensors, else .bin, else a single GGUF file.
    Without a network a complete copy in the cache is taken.

    Args:
        address: the model.
        progress: receives the progress events.

    Raises:
        UsageError: the model does not exist, is gated, or has no weights in a supported form.
        OffsiteError: the hub cannot be reached, and the cache has no copy.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    # Errors of the connection are of the HTTP library, which differs between versions: bases of the hub's own error.
    bases: tuple[type[Exception], ...] = tuple(
        base for base in HfHubHTTPError.__mro__ if issubclass(base, Exception) and base is not Exception
    )
    unreachable: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, *bases)
    try:
        info = HfApi().model_info(address.model, revision=address.revision, files_metadata=True)
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
        files = _wanted_files(address, sorted(sizes))
        size = sum(sizes[name] for name in files)
        progress(Event(f"downloading {address.model} ({size / 1e6:,.0f} MB)", 0))
        folder = Path(snapshot_download(address.model, revision=info.sha, allow_patterns=[*files]))
    except OffsiteError:
        raise
    except GatedRepoError as error:
        raise UsageError(
            f"{address.model} is given only to those who accept its terms",
            reasons=[_first_line(error)],
            next_step="accept them on the model's page of the hub, then log in with `hf auth login`",
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UsageError(
            f"the hub has no model {address.model}{f' at {address.revision}' if address.revision else ''}",
            reasons=[_first_line(error)],
            next_step="check the name; for a private model log in with `hf auth login`",
        ) from None
    except unreachable as error:  # no network, or a proxy that refuses
        folder = _cached(address, error)
    return folder / address.file if address.file else folder


def _wanted_files(address: HubAddress, names: Sequence[str]) -> list[str]:
    """The files of a model to download: one form of its weights, and its settings.

    Raises:
        UsageError: the model has no such file, no weights in a supported form, or several GGUF files.
    """
    if address.file is not None:
        if address.file not in names:
            raise UsageError(
                f"{address.model} has no file {address.file}",
                reasons=list(names[:20]),
                next_step="name one of its files",
            )
        return [address.file]
    settings = [name for name in names if name in _SETTINGS or name.endswith((".model", ".jinja"))]
    shards = [name for name in names if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]
    bins = [name for name in names if re.fullmatch(r"pytorch_model-\d+-of-\d+\.bin", name)]
    for weights in ([WEIGHTS], [INDEX, *shards], [BIN_WEIGHTS], [BIN_INDEX, *bins]):
        if set(weights) <= set(names):
            return [*settings, *weights]
    ggufs = [name for name in names if name.lower().endswith(".gguf") and "mmproj" not in name.lower()]
    if len(ggufs) == 1:
        return ggufs
    raise UsageError(
        f"{address.model} has {f'{len(ggufs)} GGUF files' if ggufs else 'no weights that can be imported'}",
        reasons=ggufs[:20] or list(names[:20]),
        next_step=f"name one of them: `offsite import hub:{address.model}/{ggufs[0]} --out base/`"
        if ggufs
        else "choose a model with model.safetensors, pytorch_model.bin or a GGUF file",
    )


def _cached(address: HubAddress, error: Exception) -> Path:
    """The folder of a model in the hub's cache, after the hub could not be reached.

    Raises:
        OffsiteError: the cache has no copy.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(address.model, revision=address.revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        folder = None
    if folder is None or not (folder / (address.file or CONFIG)).exists():
        raise OffsiteError(
            f"cannot download {address.model} from the hub, and its cache has no copy",
            reasons=[f"{type(error).__name__}: {_first_line(error)}"],
            next_step=_NO_COPY.format(model=address.model),
        ) from error
    return folder


def _first_line(error: Exception) -> str:
    """The first line of an exception's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
