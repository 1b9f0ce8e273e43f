"""The checks before a return is plugged in, which `--plan` runs too. They record nothing in the ledger. Torch-free."""

from typing import Literal

import numpy as np

from offsite.config import PlugInSpec
from offsite.errors import IncompatibleError, UsageError
from offsite.model_owner.base_model import BaseModel, fingerprint, open_base
from offsite.model_owner.intake import issued_bundle
from offsite.model_owner.ledger import Issued, Ledger, plugged_in_before, returned_digest
from offsite.model_owner.plugging_in.carry import carry_of, require_fitting_map
from offsite.model_owner.plugging_in.plugged_tensors import Chosen
from offsite.progress import Progress
from offsite.protocol.artifacts import Base, Return
from offsite.protocol.home import Home

Form = Literal["adapter", "merged"]


def check_plug_in(
    returned: Return, base: Base, spec: PlugInSpec, home: Home, progress: Progress
) -> tuple[BaseModel, Issued]:
    """Check that a return can be plugged into this base.

    Every weight of the base is read once, to compare its fingerprint with the bundle's.

    Args:
        returned: the verified return.
        base: the owner's full model.
        spec: form, checkpoint, and whether a return may be plugged in again.
        home: the model owner's home folder, with its keys and its ledger.
        progress: receives the progress events.

    Returns:
        The opened base, and the ledger's record of the bundle that the return belongs to.

    Raises:
        VerificationError: this home never issued the bundle.
        PolicyError: the return was plugged in before.
        IncompatibleError: the base is not the one that the bundle was packed from, or the ledger's map does not fit
            bundle and base.
        UsageError: the return's method does not support the requested form, or the return has no such checkpoint.
    """
    parent = issued_bundle(returned, home)
    form_of(returned, spec)
    chosen = chosen_by(returned, parent, spec)
    carry = carry_of(parent)
    before = Ledger(home.ledger).plugged_in(returned, returned_digest(returned, chosen.checkpoint))
    if before and not spec.again:
        raise plugged_in_before(before)
    model = open_base(base)
    if fingerprint(model, home.identity(), base, progress=progress) != parent.manifest.base:
        raise IncompatibleError(
            f"{base.folder} is not the base that this bundle was packed from",
            reasons=["its fingerprint differs from the ledger's"],
            next_step="name the folder that `offsite pack` was given for this bundle",
        )
    require_fitting_map(carry, model, parent.manifest)
    return model, parent


def form_of(verified: Return, spec: PlugInSpec) -> Form:
    """The form of the plug-in, "adapter" or "merged": the requested one, else the default for the return's method.

    Raises:
        UsageError: the requested form is not available for the return's method, or for a return with a classifier.
    """
    method = verified.manifest.method
    if verified.manifest.classes is not None:
        if spec.as_ == "adapter":
            raise UsageError(
                "a return with a classifier becomes a complete checkpoint, since an adapter folder has no place for it",
                next_step="plug it in with --as merged",
            )
        return "merged"
    if method == "bottleneck" and (spec.as_ == "merged" or spec.whole is not None):
        raise UsageError(
            "a bottleneck is a module of its own and cannot be merged into the base's weights",
            next_step="plug it in with --as adapter" + (", and without --whole" if spec.whole else ""),
        )
    if method in ("full", "bitfit") and spec.as_ == "adapter":
        raise UsageError(
            f"a {method} return holds the model's own tensors, which no adapter folder can carry",
            next_step="plug it in with --as merged",
        )
    if spec.whole is not None:
        return "merged"
    return spec.as_ or ("adapter" if method in ("lora", "bottleneck") else "merged")


def chosen_by(verified: Return, parent: Issued, spec: PlugInSpec) -> Chosen:
    """The checkpoint of a return and the strength to plug in, from the settings.

    The defaults are the last checkpoint and strength 1.

    Args:
        verified: the verified return.
        parent: the ledger's record of its bundle.
        spec: the settings.

    Raises:
        UsageError: the return has no such checkpoint.
    """
    there = verified.manifest.checkpoints
    if spec.checkpoint is not None and spec.checkpoint > there:
        raise UsageError(
            f"{verified.folder} has no checkpoint {spec.checkpoint}",
            reasons=[f"it holds {there}, counted from 1; the last is what it holds under the usual name"],
            next_step=f"give --checkpoint from 1 to {there}, or leave it out for the last",
        )
    return Chosen(verified, parent, spec.checkpoint or there, np.float32(strength_of(spec)))


def strength_of(spec: PlugInSpec) -> float:
    """The strength in the settings, 1 by default: the factor of the returned change; 0 gives the base's weights."""
    return 1.0 if spec.strength is None else spec.strength
