"""Packing: split, select, heal, write and sign a bundle for one recipient."""

import contextlib
import datetime
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offsite.config import PackSpec
from offsite.data.row_files import data_digest
from offsite.errors import IncompatibleError, StorageError
from offsite.model_owner.base_model import BaseModel, fingerprint, open_base
from offsite.model_owner.compress.declare import declared_of
from offsite.model_owner.heal.share import shared
from offsite.model_owner.importing.vision_tower import processor_class
from offsite.model_owner.ledger import Ledger
from offsite.model_owner.partition import (
    DTYPES,
    bundle_config,
    bundle_tensors,
    counts,
    lora_targets,
    permitted_methods,
    returnable,
    returnable_head,
)
from offsite.model_owner.sandwich import Sandwich
from offsite.model_owner.select.select_blocks import select_blocks
from offsite.model_owner.split import split
from offsite.model_owner.work import work_of
from offsite.models.architectures import config_problems
from offsite.models.modules.declared import Declared, wrapped
from offsite.progress import Event, Progress, silent
from offsite.protocol.artifacts import Base, Bundle
from offsite.protocol.contents import (
    ALLOWED_KEYS,
    CONFIG,
    GENERATION_CONFIG,
    PROCESSOR,
    TOKENIZER_FILES,
    cleaned,
    content_problems,
    tokenizer_digest,
)
from offsite.protocol.home import Home
from offsite.protocol.manifest import FORMAT, BundleManifest, FileEntry, Split
from offsite.protocol.sealing import file_entries, seal
from offsite.storage.files import require_free, staged_folder, write_stream
from offsite.storage.safetensors_files import DECLARED_WEIGHTS, WEIGHTS, TensorRange, strict_json, write_checkpoint

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
    require_free(out)
    identity, key = home.identity(), home.trusted_key(recipient)
    model = open_base(base)
    sandwich = split(model, spec)
    permitted_methods(model, spec)
    if model.row.vision is not None and model.row.vision.extra and _runs_blocks(sandwich, spec):
        from offsite.models.loading import require_library

        require_library(model.row, model.folder)
    dtype = DTYPES[spec.dtype]
    settings_files(model, range(model.blocks), dtype)  # what may not travel must not show after the long work
    base_code = fingerprint(model, identity)
    with staged_folder(out) as folder, _scratch(out, folder, base_code, spec, resume=resume) as scratch:
        chosen = select_blocks(model, sandwich, spec, scratch, progress)
        emulator = shared(sandwich.middle, chosen) if "share" in spec.heal.steps else chosen
        healed = _heal(model, sandwich, emulator, spec, scratch, out, progress)
        kept = sandwich.kept(emulator)
        progress(Event("writing the bundle", 0))
        numbers = counts(sandwich, kept)
        declared = declared_of(model, numbers.bottom, emulator, spec)
        weights = DECLARED_WEIGHTS if declared else WEIGHTS
        written = write_checkpoint(folder, bundle_tensors(model, kept, healed, dtype, numbers, spec), weights=weights)
        settings = settings_files(model, kept, dtype, declared)
        written += [write_stream(folder / name, [content]) for name, content in settings.items()]
        parties = Parties(identity.public_key.hex, key.hex, base_code)
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
        architecture=model.row.model_type,
        split=numbers,
        methods=permitted_methods(model, spec),
        max_rank=spec.permits.max_rank,
        max_width=spec.permits.max_width,
        tensors=returnable(model, kept, numbers, DTYPES[spec.dtype]),
        lora_targets=lora_targets(model, kept, numbers),
        head=returnable_head(model, spec),
        files=files,
    )


def _runs_blocks(sandwich: Sandwich, spec: PackSpec) -> bool:
    """Whether the base's network runs, to select blocks or to heal them."""
    work = work_of(sandwich.middle, spec)
    chooses = spec.select.by == "influence" and spec.kept(sandwich.middle) < len(sandwich.middle)
    return work.block_by_block or work.distills or chooses


def _heal(
    model: BaseModel,
    sandwich: Sandwich,
    emulator: Sequence[int],
    spec: PackSpec,
    scratch: Path,
    out: Path,
    progress: Progress,
) -> Mapping[str, TensorRange]:
    work = work_of(sandwich.middle, spec)
    if not (work.block_by_block or work.distills):
        return {}
    from offsite.model_owner.heal.heal_steps import heal
    from offsite.training.run_log import log_file

    return heal(model, sandwich, emulator, spec, scratch, log_file(out), progress)


@contextlib.contextmanager
def _scratch(out: Path, staging: Path, base: str, spec: PackSpec, *, resume: bool) -> Iterator[Path]:
    """Where healed weights lie until the bundle is written; where the work is long, it outlives an interruption."""
    if not spec.resumable:
        with tempfile.TemporaryDirectory(dir=staging.parent, prefix=".healed.") as folder:
            yield Path(folder)
        return
    from offsite.training.resume_points import RunState
    from offsite.training.run_log import run_folder

    text = data_digest(spec.calibration.source) if spec.calibration.source else None
    identity = {**spec.flat(without=_FREE_SETTINGS), "base": base, "text": text}
    state = RunState(run_folder(out), identity, resume=resume)
    yield state.folder
    state.remove()


def _input_files(model: BaseModel) -> list[Path]:
    """What makes inputs of text, or of images."""
    if model.row.vision is None:
        return _tokenizer_files(model)
    if not (model.folder / PROCESSOR).is_file():
        raise StorageError(
            f"{model.folder} holds no {PROCESSOR}, without which nobody knows how images are given to the model",
            next_step="copy the image processor's file into the base folder",
        )
    return [model.folder / PROCESSOR]


def _tokenizer_files(model: BaseModel) -> list[Path]:
    found = [model.folder / name for name in TOKENIZER_FILES if (model.folder / name).is_file()]
    if not any(path.name in ("tokenizer.json", "tokenizer.model", "vocab.json") for path in found):
        raise StorageError(
            f"{model.folder} holds no tokenizer, without which the bundle could not be tuned",
            reasons=["expected tokenizer.json, tokenizer.model or vocab.json"],
            next_step="copy the tokenizer's files into the base folder",
        )
    return found


def settings_files(
    model: BaseModel, kept: Sequence[int], dtype: str, declared: Declared | None = None
) -> dict[str, bytes]:
    """What a bundle holds beside its weights, by file name: config, and tokenizer or image processor, cleaned.

    Raises:
        IncompatibleError: a file holds what may not travel.
        StorageError: there is no tokenizer, or a file cannot be read.
    """
    config = bundle_config(model, kept, dtype)
    problems = config_problems(config, model.row)
    if problems:
        raise IncompatibleError(
            "the base's config holds what may not travel", reasons=problems, next_step=f"mend {CONFIG} in the base"
        )
    files = {CONFIG: _json(wrapped(config, declared) if declared else config)}
    others = _input_files(model)
    if model.row.vision is None and (model.folder / GENERATION_CONFIG).is_file():
        others.append(model.folder / GENERATION_CONFIG)
    for source in others:
        files[source.name] = _json(_cleaned_file(source)) if source.name in ALLOWED_KEYS else source.read_bytes()
    return files


def _cleaned_file(source: Path) -> dict[str, Any]:
    try:
        content = strict_json(source.read_bytes())
    except ValueError as error:
        raise StorageError(
            f"{source} is not JSON", reasons=[str(error)], next_step="mend the file in the base"
        ) from None
    kept = cleaned(source.name, content) if isinstance(content, dict) else content
    if source.name == PROCESSOR and isinstance(kept, dict) and not kept.get("image_processor_type"):
        kept["image_processor_type"] = processor_class(source.parent)
    problems = content_problems(source.name, kept)
    if problems:
        raise IncompatibleError(
            f"{source} holds what may not travel", reasons=problems, next_step="mend the file in the base"
        )
    return dict(kept)


def _json(content: object) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True).encode() + b"\n"
