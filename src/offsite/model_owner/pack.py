"""Packing: splits a base, selects and heals blocks, then writes and signs a bundle for one recipient."""

import contextlib
import datetime
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from offsite.config import PackSpec
from offsite.data.read_rows import first
from offsite.errors import IncompatibleError, OffsiteError, StorageError
from offsite.model_owner.base_model import BaseModel, fingerprint
from offsite.model_owner.bundle_settings import settings_files
from offsite.model_owner.bundle_tensors import (
    DTYPES,
    bundle_tensors,
    counts,
    lora_targets,
    permitted_methods,
    returnable,
    returnable_head,
)
from offsite.model_owner.check_bundle import open_bundle, open_settings
from offsite.model_owner.check_packing import check_packing, identity_of_packing
from offsite.model_owner.compress.declare_emulator import declared_of
from offsite.model_owner.count_base_shares import count_base_shares
from offsite.model_owner.describe_emulator import describe_emulator
from offsite.model_owner.emulator_work import Work, work_of
from offsite.model_owner.heal.heal_steps import fill_places, heal
from offsite.model_owner.heal.healing_protocol import Healing
from offsite.model_owner.importing.write_weights import require_finite
from offsite.model_owner.ledger import Ledger
from offsite.model_owner.make_carry_map import make_carry_map
from offsite.model_owner.narrow.choose_widths import choose_widths
from offsite.model_owner.select.select_blocks import select_blocks
from offsite.model_owner.tuning_arithmetic import count_tuning_arithmetic
from offsite.models.families.declared_family import declare_family
from offsite.models.modules.declared import Declared
from offsite.progress import Event, Progress, silent
from offsite.protocol.artifacts import Base, Bundle
from offsite.protocol.contents import (
    tokenizer_digest,
)
from offsite.protocol.home import Home
from offsite.protocol.manifest import FAMILY, FORMAT, BundleManifest, FileEntry, Split
from offsite.protocol.sealing import file_entries, seal
from offsite.storage.checkpoint_folder import DECLARED_WEIGHTS, WEIGHTS, write_checkpoint
from offsite.storage.files import staged_folder, write_stream
from offsite.storage.finite import FiniteWatch
from offsite.storage.lock import LOCK, alone_in
from offsite.storage.safetensors_files import NewTensor
from offsite.training.run_log import log_file, run_folder, run_log

PACKING = "pack"  # the event of the log that says how the emulator is made


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
    """Make a signed bundle of a base model for one trusted recipient, and record it in the ledger.

    Distillation, search, and healing block by block save resume points in `<out>.run/`. The log `<out>.log.jsonl`
    describes the emulator, and has the loss of distillation. Neither is part of the bundle.

    Args:
        base: the owner's full model; it is only read.
        out: the bundle's folder; it appears only when it is complete.
        recipient: the name under which the owner's home stores the data owner's public key.
        spec: the settings of splitting, compression and healing.
        home: the model owner's home folder, with its keys and its ledger.
        progress: receives the progress events.
        resume: continue an interrupted distillation or search; start a new one if there is none. Interrupted healing
            block by block continues with and without it.

    Raises:
        UsageError: a setting does not fit the model, the recipient is unknown, `out` is not empty, or an interrupted
            run exists that cannot be resumed or that `resume` does not ask for.
        IncompatibleError: the model cannot be split or healed with these settings, weights hold NaN or infinity, or
            the bundle could not be tuned: its tokenizer or image processor does not fit, or its loss is not finite.
        DataError: the calibration text is unreadable or too short.
        OffsiteError: the distillation diverged.
        StorageError: a file cannot be read or written; `out` is unchanged.
        KeyboardInterrupt: the user interrupted the run.
    """
    Ledger(home.ledger).settle()
    checked = check_packing(base, out, recipient, spec, home, resume=resume)
    model, sandwich, identity, spec = checked.model, checked.sandwich, checked.identity, checked.spec
    dtype = DTYPES[spec.dtype]
    bad: list[str] = []
    open_settings(model, settings_files(model, range(model.blocks), dtype))
    base_code = fingerprint(model, identity, bad=bad, progress=progress)
    require_finite(bad, model.folder)
    with (
        _log(out) as log,
        staged_folder(out) as folder,
        _scratch(out, folder, base_code, spec, work_of(sandwich.middle, spec), resume=resume) as scratch,
    ):
        with run_log(log) as write:
            write({"event": PACKING, "emulator": describe_emulator(model, sandwich, spec)})
        chosen = select_blocks(model, sandwich, spec, scratch, progress)
        emulator = fill_places(sandwich.middle, chosen, spec)
        widths = choose_widths(model, emulator, spec, scratch, progress) if spec.narrows else None
        healed = heal(Healing(model, sandwich, emulator, widths, spec, scratch, log, progress))
        kept = sandwich.kept(emulator)
        numbers = counts(sandwich, kept, spec)
        declared = declared_of(model, numbers.bottom, emulator, spec, widths)
        weights = DECLARED_WEIGHTS if declared else WEIGHTS
        watch = FiniteWatch()
        tensors = watch.over(bundle_tensors(model, kept, healed.tensors, dtype, numbers, spec, declared))
        written = write_checkpoint(folder, _reported(tensors, progress), weights=weights)
        _require_finite_result(watch.found)
        settings = settings_files(model, kept, dtype, declared)
        written += [write_stream(folder / name, [content]) for name, content in settings.items()]
        parties = Parties(identity.public_key.hex, checked.recipient.hex, base_code)
        manifest = bundle_manifest(model, kept, numbers, spec, file_entries(written), parties, declared)
        carry = make_carry_map(model, kept, healed, declared, spec, manifest, folder)
        shares = count_base_shares(model, kept, numbers, healed, declared, spec, folder)
        open_bundle(model, folder, manifest, home, progress)
        bundle = seal(folder, manifest, identity, out)
        arithmetic = count_tuning_arithmetic(model, kept, numbers, declared)
        Ledger(home.ledger).record_issue(bundle, recipient, carry, shares, arithmetic, spec, folder)
    return bundle


def _reported(tensors: Sequence[NewTensor], progress: Progress) -> list[NewTensor]:
    """Wrap the tensors of a bundle so that the progress is reported when their values are written."""
    written = itertools.count(1)

    def chunks(tensor: NewTensor) -> Iterator[bytes | memoryview]:
        yield from tensor.chunks()
        progress(Event("writing the bundle", next(written), len(tensors)))

    progress(Event("writing the bundle", 0, len(tensors)))
    return [replace(tensor, chunks=partial(chunks, tensor)) for tensor in tensors]


def _require_finite_result(bad: Sequence[str]) -> None:
    """Raise an error if healing or compression of finite weights resulted in NaN or infinity.

    Args:
        bad: the names of the bundle's tensors that have such values.

    Raises:
        IncompatibleError: `bad` is not empty.
    """
    if bad:
        raise IncompatibleError(
            "the bundle's weights hold NaN or infinity, though the base's are finite",
            reasons=first([f"{name} holds values that are not finite" for name in bad]),
            next_step="pack with other settings of healing or pruning, such as --heal none, or with --dtype fp32",
        )


@dataclass(frozen=True)
class Parties:
    """The public keys of a bundle's issuer and recipient, and the base's fingerprint; each is 64 hex digits."""

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
    """The manifest of a new bundle, with the current time as its time of issue.

    Args:
        model: the opened base.
        kept: base indices of the bundle's blocks, in order.
        numbers: the manifest's split: how many blocks each part of the bundle has, and which emulator blocks train.
        spec: the settings of packing.
        files: the bundle's files, with sizes and digests.
        parties: the keys of issuer and recipient, and the base's fingerprint.
        declared: what the bundle's config declares of blocks that differ from the family's; None if none does.
    """
    row = declare_family(model.family, kept) if model.family.layouts else None
    return BundleManifest(
        kind="bundle",
        format=FORMAT,
        requires=(*(declared.features if declared else ()), *numbers.features, *((FAMILY,) if row else ())),
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
        tensors=returnable(model, kept, numbers, DTYPES[spec.dtype], declared),
        lora_targets=lora_targets(model, kept, numbers, declared),
        head=returnable_head(model, spec),
        declared_family=row,
        files=files,
    )


@contextlib.contextmanager
def _log(out: Path) -> Iterator[Path]:
    """Context manager: yield the path of the log; if packing fails and cannot be resumed, a new log is deleted.

    `out` is the bundle's folder.
    """
    log = log_file(out)
    new = not log.exists()
    try:
        yield log
    except BaseException:
        if new and not run_folder(out).exists():
            log.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _scratch(out: Path, staging: Path, base: str, spec: PackSpec, work: Work, *, resume: bool) -> Iterator[Path]:
    """Context manager: yield a folder for healed weights and intermediate results, which is deleted after the body.

    For settings with distillation or search, the folder remains if the body fails, so that packing can be resumed.
    For others that change blocks one by one, it remains if it has results when the body is interrupted, or when a file
    cannot be written; then the same packing continues without `resume`.

    Args:
        out: the bundle's folder.
        staging: the folder in which the bundle is written before it is moved to `out`.
        base: the base's fingerprint.
        spec: the settings.
        work: the healing and pruning that the settings require.
        resume: whether to continue with the folder of an interrupted run.
    """
    if not spec.resumable and not work.block_by_block:
        with tempfile.TemporaryDirectory(dir=staging, prefix=".healed.") as folder:
            yield Path(folder)
        return
    from offsite.training.resume_points import RunState

    identity = {**identity_of_packing(spec), "base": base}
    asks = spec.resumable  # a search or distillation is continued only on request
    with alone_in(run_folder(out), "packing", "wait for it or stop it, then run the same command again"):
        state = RunState(run_folder(out), identity, resume=resume or not asks, restartable=not asks)
        try:
            yield state.folder
        except BaseException as error:
            refused = isinstance(error, OffsiteError) and not isinstance(error, StorageError)
            if not asks and (refused or not _holds_results(state.folder)):
                state.remove()  # the same packing would fail again, or has nothing to continue with
            raise
        state.remove()


def _holds_results(folder: Path) -> bool:
    """Whether the folder of a run has a file besides those that every run has: a resume point, or a stored choice."""
    return any(path.is_file() and path.name not in ("run.json", LOCK) for path in folder.iterdir())
