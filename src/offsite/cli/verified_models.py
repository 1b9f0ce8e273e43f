"""Opens the models that a command names: bases, bundles, plug-ins and returns, verified if they are signed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from offsite.cli import terminal

if TYPE_CHECKING:
    from offsite.protocol.artifacts import Bundle, PlugIn, Return
    from offsite.protocol.home import Home

    Adapter = Return | PlugIn | Path | None


@dataclass(frozen=True)
class NamedModel:
    """A model of a command line, with the adapter on it; `name` is the folder of the adapter, else of the model."""

    name: str
    model: "Path | Bundle | PlugIn"
    adapter: "Adapter"


def verify_models(folders: Sequence[Path], home: "Home") -> list[NamedModel]:
    """Verify the models that a command line lists; an adapter is used on the nearest model before it.

    So `base/ plugged/ other/` is three models: the base, the base with the adapter plugged/, and other/. The hashed
    weights do not remain in memory; when a model is loaded, its files are read again and compared with the hashes.

    Raises:
        UsageError: the first folder is an adapter; or this home has no key.
        VerificationError: an artifact fails verification.
        IncompatibleError: a plug-in was made for another base.
    """
    from offsite.errors import UsageError

    found: list[NamedModel] = []
    model: Path | Bundle | PlugIn | None = None
    for folder in folders:
        if not _is_adapter(folder):
            model = _verified_model(folder, home, hold=False)
            found.append(NamedModel(str(folder), model, None))
        elif model is None:
            raise UsageError(
                f"{folder} is an adapter, and no model is named before it",
                next_step="name its base (of a plug-in) or its bundle (of a return) before it",
            )
        else:
            found.append(NamedModel(str(folder), model, _verified_adapter(folder, model, home, hold=False)))
    return found


def _is_adapter(folder: Path) -> bool:
    """Whether a folder has weights and no config of a model, as adapters and returns have."""
    return not (folder / "config.json").exists() and any(folder.glob("*.safetensors"))


def verify_model(
    model: Path, adapter: Path | None, home: "Home", *, hold: bool = True
) -> "tuple[Path | Bundle | PlugIn, Adapter]":
    """Verify the model and the adapter if they are signed; a folder without a signature is returned as a path.

    Args:
        model: the folder of the model.
        adapter: the folder of the adapter; None: there is none.
        home: this party's home.
        hold: whether the hashed weights remain in memory.

    Raises:
        UsageError: the adapter is a bundle, or this home has no key.
        VerificationError: an artifact fails verification.
        IncompatibleError: the plug-in was made for another base.
    """
    scored = _verified_model(model, home, hold=hold)
    return scored, _verified_adapter(adapter, scored, home, hold=hold) if adapter else None


def _verified_model(model: Path, home: "Home", *, hold: bool) -> "Path | Bundle | PlugIn":
    """Verify a model, which is no return: those have no config.json, and were refused or taken for adapters before."""
    from offsite.protocol.artifacts import Return

    verified = _verified(model, home, hold=hold)
    assert not isinstance(verified, Return)
    return verified


def _verified_adapter(
    adapter: Path, model: "Path | Bundle | PlugIn", home: "Home", *, hold: bool
) -> "Return | PlugIn | Path":
    """Verify an adapter; raises UsageError if it is a bundle, and IncompatibleError if it is for another base."""
    from offsite.errors import UsageError
    from offsite.protocol.artifacts import Bundle, PlugIn

    verified = _verified(adapter, home, hold=hold)
    if isinstance(verified, Bundle):
        raise UsageError(f"{adapter} is a bundle, not an adapter", next_step="name it as the model, without --adapter")
    if isinstance(verified, PlugIn) and isinstance(model, Path):
        _require_own_base(model, verified, home)
    return verified


def _verified(folder: Path, home: "Home", *, hold: bool) -> "Path | Bundle | Return | PlugIn":
    """Verify a signed folder; for a folder without a signature, print that it is used without verification.

    A folder with one of manifest and signature has lost the other, so it fails verification.
    """
    from offsite.protocol.manifest import MANIFEST, SIGNATURE
    from offsite.protocol.verify import verify

    if any((folder / name).exists() for name in (MANIFEST, SIGNATURE)):
        return verify(folder, home, hold=hold)
    terminal.say(f"{folder} has no signature; it is used as it is")
    return folder


def _require_own_base(base: Path, plug_in: "PlugIn", home: "Home") -> None:
    """Check that a plug-in that this home's owner made is for this base.

    Plug-ins of others are not checked, since only the key of their owner can compute the base's fingerprint.

    Raises:
        IncompatibleError: the plug-in was made for another base.
    """
    from offsite.errors import IncompatibleError
    from offsite.model_owner.base_model import fingerprint, open_base
    from offsite.protocol.artifacts import Base

    identity = home.identity()
    if plug_in.manifest.issuer != identity.public_key.hex:
        return
    if fingerprint(open_base(Base(base)), identity) != plug_in.manifest.base:
        raise IncompatibleError(
            f"the plug-in {plug_in.folder} was made for another base than {base}",
            next_step="name the base that `offsite plug-in` was given",
        )


def sees_images(model: Path) -> bool:
    """Whether a model is an image encoder or classifier.

    Raises:
        UsageError: the folder is not a checkpoint.
    """
    from offsite.models.image_encoder import sees_images
    from offsite.models.model_folder import model_settings

    return sees_images(model_settings(model))
