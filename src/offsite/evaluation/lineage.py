"""Checks that an adapter belongs to a model, by the digests in their signed manifests. Torch-free."""

import shlex
from pathlib import Path

from offsite.errors import IncompatibleError
from offsite.protocol.artifacts import Base, Bundle, PlugIn, Return


def require_lineage(model: Path | Base | Bundle | PlugIn, adapter: Path | Return | PlugIn | None) -> None:
    """Check that an adapter was made for the model that it is scored on.

    A return can only be scored on its bundle: the same blocks may have other indices in the base, and an adapter on
    other blocks gives wrong scores without an error. A folder without a signature does not name its parent, so it is
    not checked.

    Args:
        model: the model, verified if it is signed.
        adapter: the adapter, verified if it is signed; None: the model is scored alone.

    Raises:
        IncompatibleError: the adapter was made for another model.
    """
    if isinstance(adapter, Return):
        parent = adapter.manifest.bundle
        if isinstance(model, Bundle) and model.digest == parent:
            return
        other = "another bundle" if isinstance(model, Bundle) else "no bundle"
        raise IncompatibleError(
            f"the return {adapter.folder} was tuned on the bundle {parent[:12]}, and {_folder(model)} is {other}",
            reasons=["its tensors are for the blocks of that bundle, which are not those of the base"],
            next_step="score it on its bundle; for the base, run "
            f"`offsite plug-in BASE {shlex.quote(str(adapter.folder))} --out PLUGGED` and score the result",
        )
    if isinstance(adapter, PlugIn):
        if adapter.manifest.form == "merged":
            raise IncompatibleError(
                f"the plug-in {adapter.folder} is a complete model, not an adapter",
                next_step=f"score it alone: `offsite eval {shlex.quote(str(adapter.folder))} --data FILE`",
            )
        if isinstance(model, Bundle | PlugIn):
            kind = "bundle" if isinstance(model, Bundle) else "complete model"
            raise IncompatibleError(
                f"the plug-in {adapter.folder} is an adapter for its base, and {model.folder} is a {kind}",
                next_step="name the base's folder as the model",
            )


def _folder(model: Path | Base | Bundle | PlugIn) -> Path:
    return model if isinstance(model, Path) else model.folder
