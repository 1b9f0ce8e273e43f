"""Plugging in: a verified return is put into the base model. Tensors move by name; no model is built, torch-free."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from offsite.config import PlugInSpec
from offsite.errors import PolicyError, VerificationError
from offsite.model_owner.base_model import BaseModel, require_unchanged
from offsite.model_owner.check_plug_in import check_plug_in, chosen_by, form_of, strength_of
from offsite.model_owner.intake import require_taken_in
from offsite.model_owner.ledger import Issued, Ledger
from offsite.model_owner.plug_in_contents import plug_in_contents, plug_in_manifest
from offsite.progress import Event, Progress, silent
from offsite.protocol.artifacts import Base, PlugIn, Return
from offsite.protocol.home import Home
from offsite.protocol.sealing import file_entries, seal
from offsite.storage.files import require_free, staged_folder


def plug_in(
    base: Base, returned: Return, out: Path, spec: PlugInSpec, home: Home, progress: Progress = silent
) -> PlugIn:
    """Put a return into the base model it was made for.

    Args:
        base: the owner's full model, the one that the bundle was packed from; it is only read.
        returned: what `intake` gave.
        out: an adapter folder, for LoRA one for `PeftModel.from_pretrained(base, out)`; or a complete checkpoint.
        spec: the form, and whether a return may be plugged in again.
        home: the owner's.
        progress: where the events go.

    Raises:
        VerificationError: the return does not fit into the base's dtype at this strength.
        PolicyError: it was plugged in before.
        IncompatibleError: the base is another one than the bundle's.
        UsageError: the return was not taken in by this home, its method has no such form, it has no such checkpoint,
            or `out` holds something.
    """
    require_free(out)
    model, parent = open_base_of(returned, base, spec, home, progress)
    form, chosen = form_of(returned, spec), chosen_by(returned, parent, spec)
    progress(Event("writing the plug-in", 0))
    # the ledger's entry is there before the folder appears, and taken back if it does not
    with ExitStack() as entry, staged_folder(out) as folder:
        with refusals_recorded(returned, home):
            written = plug_in_contents(model, chosen, form).write(folder)
        require_unchanged(model)
        manifest = plug_in_manifest(
            model, chosen, form, strength_of(spec), home.identity().public_key.hex, file_entries(written)
        )
        plugged = seal(folder, manifest, home.identity(), out)
        entry.enter_context(Ledger(home.ledger).recording_plug_in(plugged, again=spec.again))
    return plugged


def open_base_of(
    returned: Return, base: Base, spec: PlugInSpec, home: Home, progress: Progress
) -> tuple[BaseModel, Issued]:
    """Open the base that a return was made for, and look its bundle up in the ledger.

    Raises:
        PolicyError: as `plug_in`.
        IncompatibleError: as `plug_in`.
        UsageError: the return was not taken in by this home, its method has no such form, or it has no such checkpoint.
    """
    require_taken_in(returned, home)
    try:
        return check_plug_in(returned, base, spec, home, progress)
    except PolicyError as refusal:
        Ledger(home.ledger).record_intake(returned.digest, returned.manifest.bundle, refusal.reasons)
        raise


@contextmanager
def refusals_recorded(verified: Return, home: Home) -> Iterator[None]:
    """Enter a return that turns out not to fit while it is used as refused in the ledger."""
    try:
        yield
    except VerificationError as error:
        Ledger(home.ledger).record_intake(verified.digest, verified.manifest.bundle, error.reasons or (error.what,))
        raise
