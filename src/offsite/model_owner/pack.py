"""Packing: split, select, heal, write and sign a bundle for one recipient."""

import contextlib
import datetime
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from offsite.config import PackSpec
from offsite.data.data_files import data_digest
from offsite.model_owner.base_model import BaseModel, fingerprint
from offsite.model_owner.bundle_settings import settings_files
from offsite.model_owner.check_packing import check_packing
from offsite.model_owner.compress.declare import declared_of
from offsite.model_owner.heal.heal_steps import fill_places, heal
from offsite.model_owner.heal.healing import Healing
from offsite.model_owner.ledger import Ledger
from offsite.model_owner.partition import (
    DTYPES,
    bundle_tensors,
    counts,
    lora_targets,
    permitted_methods,
    returnable,
    returnable_head,
)
from offsite.model_owner.select.select_blocks import select_blocks
from offsite.models.modules.declared import Declared
from offsite.progress import Event, Progress, silent
from offsite.protocol.artifacts import Base, Bundle
from offsite.protocol.contents import (
    tokenizer_digest,
)
from offsite.protocol.home import Home
from offsite.protocol.manifest import FORMAT, BundleManifest, FileEntry, Split
from offsite.protocol.sealing import file_entries, seal
from offsite.storage.checkpoint_folder import DECLARED_WEIGHTS, WEIGHTS, write_checkpoint
from offsite.storage.files import staged_folder, write_stream
from offsite.training.run_log import log_file, run_folder

# Settings that do not change what comes out, so a resumed run may have others.
_FREE_SETTINGS = frozenset({"threads", "search_minutes"})


def pack(
    base: Base,
    out: Path,
    recipient: str,
    spec: PackSpec,
    home: Home,
    progress: Progress = silent,
    *,
    resume: bool = False,
) -> Bundle:
    """Make a signed bundle of a base model for one trusted party, and enter it in the ledger.

    A distillation or search keeps resume points in `<out>.run/` while it runs; a distillation writes its healing curve
    to `<out>.log.jsonl`. Both are beside the bundle, never in it.

    Args:
        base: the owner's full model; it is only read.
        out: the bundle's folder; it appears whole or not at all.
        recipient: the name under which the owner trusts the data owner's key.
        spec: how to split, compress and heal.
        home: the owner's.
        progress: where the events go.
        resume: continue an interrupted distillation or search; where there is none, start.

    Raises:
        UsageError: a setting does not fit the model, the recipient is unknown, `out` holds something, or an interrupted
            run is there that cannot or was not to be resumed.
        IncompatibleError: the model cannot be cut, or not be healed in this way.
        DataError: the calibration text is unreadable or too short.
        OffsiteError: the distillation diverged.
        StorageError: something cannot be read or written; `out` is then as it was.
        KeyboardInterrupt: the user stopped it.
    """
    checked = check_packing(base, out, recipient, spec, home, resume=resume)
    model, sandwich, identity, dtype = checked.model, checked.sandwich, checked.identity, DTYPES[spec.dtype]
    base_code = fingerprint(model, identity)
    with staged_folder(out) as folder, _scratch(out, folder, base_code, spec, resume=resume) as scratch:
        chosen = select_blocks(model, sandwich, spec, scratch, progress)
        emulator = fill_places(sandwich.middle, chosen, spec)
        healed = heal(Healing(model, sandwich, emulator, spec, scratch, log_file(out), progress))
        kept = sandwich.kept(emulator)
        progress(Event("writing the bundle", 0))
        numbers = counts(sandwich, kept)
        declared = declared_of(model, numbers.bottom, emulator, spec)
        weights = DECLARED_WEIGHTS if declared else WEIGHTS
        written = write_checkpoint(folder, bundle_tensors(model, kept, healed, dtype, numbers, spec), weights=weights)
        settings = settings_files(model, kept, dtype, declared)
        written += [write_stream(folder / name, [content]) for name, content in settings.items()]
        parties = Parties(identity.public_key.hex, checked.recipient.hex, base_code)
        manifest = bundle_manifest(model, kept, numbers, spec, file_entries(written), parties, declared)
        bundle = seal(folder, manifest, identity, out)
        Ledger(home.ledger).record_issue(bundle, recipient, kept, spec)
    return bundle


@dataclass(frozen=True)
class Parties:
    """Who issues a bundle to whom, by key, and the fingerprint of the base; each is 64 hex digits."""

    issuer: str
    recipient: str
    base: str


def bundle_manifest(
    model: BaseModel,
    kept: Sequence[int],
    numbers: Split,
    spec: PackSpec,
    files: tuple[FileEntry, ...],
    parties: Parties,
    declared: Declared | None = None,
) -> BundleManifest:
    """The manifest of a bundle that holds the base blocks `kept` in these files, issued now."""
    return BundleManifest(
        kind="bundle",
        format=FORMAT,
        requires=(*(declared.features if declared else ()), *numbers.features),
        issued_at=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        issuer=parties.issuer,
        recipient=parties.recipient,
        base=parties.base,
        tokenizer=tokenizer_digest(files),
        architecture=model.family.model_type,
        split=numbers,
        methods=permitted_methods(model, spec),
        max_rank=spec.permits.max_rank,
        max_width=spec.permits.max_width,
        tensors=returnable(model, kept, numbers, DTYPES[spec.dtype]),
        lora_targets=lora_targets(model, kept, numbers),
        head=returnable_head(model, spec),
        files=files,
    )


@contextlib.contextmanager
def _scratch(out: Path, staging: Path, base: str, spec: PackSpec, *, resume: bool) -> Iterator[Path]:
    """Where healed weights lie until the bundle is written; where the work is long, it outlives an interruption."""
    if not spec.resumable:
        with tempfile.TemporaryDirectory(dir=staging.parent, prefix=".healed.") as folder:
            yield Path(folder)
        return
    from offsite.training.resume_points import RunState

    text = data_digest(spec.calibration.source) if spec.calibration.source else None
    identity = {**spec.flat(without=_FREE_SETTINGS), "base": base, "text": text}
    state = RunState(run_folder(out), identity, resume=resume)
    yield state.folder
    state.remove()
