"""Plugging in: writes a plug-in, which is the base model with a returned adapter. Torch-free."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from offsite.config import PlugInSpec
from offsite.errors import PolicyError, VerificationError
from offsite.model_owner.base_model import BaseModel, require_unchanged
from offsite.model_owner.intake import require_taken_in
from offsite.model_owner.ledger import Issued, Ledger, returned_digest
from offsite.model_owner.plugging_in.check_plug_in import check_plug_in, chosen_by, form_of, strength_of
from offsite.model_owner.plugging_in.plug_in_contents import plug_in_contents, plug_in_manifest
from offsite.progress import Event, Progress, silent
from offsite.protocol.artifacts import Base, PlugIn, Return
from offsite.protocol.home import Home
from offsite.protocol.output_place import require_place
from offsite.protocol.sealing import file_entries, seal
from offsite.storage.files import staged_folder


def plug_in(
    base: Base, returned: Return, out: Path, spec: PlugInSpec, home: Home, progress: Progress = silent
) -> PlugIn:
    """Write the plug-in of a return: an adapter folder for the base, or the base's checkpoint with the return merged.

    The plug-in is signed and recorded in the ledger.

    Args:
        base: the owner's full model, the one that the bundle was packed from; it is only read.
        returned: the verified return, from `intake`.
        out: the new folder; if it is a LoRA adapter, `PeftModel.from_pretrained(base, out)` loads it.
        spec: form, checkpoint, strength, and whether a return may be plugged in again.
        home: the model owner's home folder, with its keys and its ledger.
        progress: receives the progress events.

    Raises:
        VerificationError: a resulting weight is not finite in its dtype at this strength.
        PolicyError: the return was already plugged in.
        IncompatibleError: the base is not the one that the bundle was packed from.
        UsageError: this home did not take in the return, its method does not support the requested form, it has no such
            checkpoint, or `out` is not empty.
    """
    require_place(out, base.folder, returned.folder)
    model, parent = open_base_of(returned, base, spec, home, progress)
    form, chosen = form_of(returned, spec), chosen_by(returned, parent, spec)
    progress(Event("writing the plug-in", 0))
    # the ledger's record is made before the folder appears, and deleted if it does not appear
    with ExitStack() as entry, staged_folder(out) as folder:
        with refusals_recorded(returned, home):
            written = plug_in_contents(model, chosen, form, spec.whole).write(folder)
        require_unchanged(model)
        manifest = plug_in_manifest(
            model, chosen, form, strength_of(spec), home.identity().public_key.hex, file_entries(written)
        )
        plugged = seal(folder, manifest, home.identity(), out)
        tensors = returned_digest(returned, chosen.checkpoint)
        entry.enter_context(
            Ledger(home.ledger).recording_plug_in(plugged, again=spec.again, tensors=tensors, staging=folder)
        )
    return plugged


def open_base_of(
    returned: Return, base: Base, spec: PlugInSpec, home: Home, progress: Progress
) -> tuple[BaseModel, Issued]:
    """Check that a return can be plugged into this base, and open the base; a PolicyError is recorded as a refusal.

    Returns:
        The opened base, and the ledger's record of the bundle that the return belongs to.

    Raises:
        PolicyError: as for `plug_in`.
        IncompatibleError: as for `plug_in`.
        UsageError: this home did not take in the return, its method does not support the requested form, or it has no
            such checkpoint.
    """
    require_taken_in(returned, home)
    Ledger(home.ledger).settle()
    try:
        return check_plug_in(returned, base, spec, home, progress)
    except PolicyError as refusal:
        Ledger(home.ledger).record_intake(returned.digest, returned.manifest.bundle, refusal.reasons)
        raise


@contextmanager
def refusals_recorded(verified: Return, home: Home) -> Iterator[None]:
    """Context manager: if the body raises a VerificationError, record the return in the ledger as refused."""
    try:
        yield
    except VerificationError as error:
        Ledger(home.ledger).record_intake(verified.digest, verified.manifest.bundle, error.reasons or (error.what,))
        raise
