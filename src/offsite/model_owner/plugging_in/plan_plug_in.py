"""The plan of a plug-in: its files and sizes. The return is verified; the ledger is not changed. Torch-free."""

import math
from dataclasses import dataclass
from pathlib import Path

from offsite.config import PlugInSpec
from offsite.model_owner.intake import check_return
from offsite.model_owner.plugging_in.check_plug_in import Form, check_plug_in, chosen_by, form_of, strength_of
from offsite.model_owner.plugging_in.plug_in_contents import plug_in_contents, plug_in_manifest
from offsite.model_owner.plugging_in.plugged_tensors import changed_tensors
from offsite.models.plan_amounts import Amount, total
from offsite.progress import Event, Progress, silent
from offsite.protocol.artifacts import Base
from offsite.protocol.home import Home
from offsite.protocol.manifest import MANIFEST, SIGNATURE, FileEntry, render_manifest
from offsite.protocol.output_place import require_place
from offsite.protocol.signing import SIGNATURE_BYTES


@dataclass(frozen=True)
class PlugInPlan:
    """What `plug_in` would write: the form, content, files and disk space of a plug-in."""

    architecture: str
    form: Form
    checkpoint: int  # number of the return's checkpoint, from 1
    strength: float
    returned_tensors: int
    returned_parameters: int
    changed_tensors: int  # changed tensors of the base in a merged plug-in; 0 for an adapter
    files: tuple[Amount, ...]  # files of the plug-in, with exact sizes
    disk: tuple[Amount, ...]

    @property
    def disk_bytes(self) -> int:
        """Free space in bytes that plugging in needs on the disk of the plug-in's folder."""
        return total(self.disk)


def plan_plug_in(
    base: Base, returned: Path, out: Path, spec: PlugInSpec, home: Home, progress: Progress = silent
) -> PlugInPlan:
    """Plan a plug-in without writing it or recording anything in the ledger.

    Verifies the return, so `intake` is not needed before. Raises the errors that `plug_in` raises before it writes.
    Reads every byte of the return and of the base, as `plug_in` does.

    Args:
        base: the owner's full model.
        returned: the return's folder.
        out: the plug-in's folder.
        spec: form, checkpoint, strength, and whether a return may be plugged in again.
        home: the model owner's home folder, with its keys and its ledger.
        progress: receives the progress events.

    Raises:
        UsageError: `out` is not empty, the return's method does not support the requested form, or the return has no
            such checkpoint.
        VerificationError: the return fails verification.
        PolicyError: the return exceeds what the bundle permits, or was already plugged in.
        IncompatibleError: the base is not the one that the bundle was packed from.
    """
    require_place(out, base.folder, returned)
    progress(Event("verifying the return", 0))
    verified = check_return(returned, home, hold=True)
    model, parent = check_plug_in(verified, base, spec, home, progress)
    form, chosen = form_of(verified, spec), chosen_by(verified, parent, spec)
    sizes = plug_in_contents(model, chosen, form, spec.whole).sizes
    entries = tuple(FileEntry(name=name, size=size, sha256="0" * 64) for name, size in sorted(sizes.items()))
    issuer = home.identity().public_key.hex
    manifest = plug_in_manifest(model, chosen, form, strength_of(spec), issuer, entries)
    sizes |= {MANIFEST: len(render_manifest(manifest)), SIGNATURE: SIGNATURE_BYTES}
    files = tuple(Amount(name, size) for name, size in sorted(sizes.items()))
    return PlugInPlan(
        architecture=model.family.model_type,
        form=form,
        checkpoint=chosen.checkpoint,
        strength=strength_of(spec),
        returned_tensors=len(chosen.tensors),
        returned_parameters=sum(math.prod(tensor.shape) for tensor in chosen.tensors.values()),
        changed_tensors=len(changed_tensors(model, chosen)) if form == "merged" else 0,
        files=files,
        disk=(Amount("plug-in", total(files)),),
    )
