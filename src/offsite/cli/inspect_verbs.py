"""The commands inspect and verify, and the description of an artifact that other commands print too."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offsite.cli import flags, terminal

if TYPE_CHECKING:
    from offsite.model_owner.emulator_score import EmulatorScore
    from offsite.protocol.artifacts import Bundle, PlugIn, Return
    from offsite.protocol.home import Home
    from offsite.protocol.manifest import BundleManifest, Manifest, PlugInManifest, ReturnManifest, TensorEntry

_Artifact = Annotated[Path, typer.Argument(metavar="PATH", help="folder of a bundle, a return or a plug-in")]
_Inspected = Annotated[Path, typer.Argument(metavar="PATH", help="folder of a bundle, return, plug-in or study")]


_For = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="vllm",
        help="of a plug-in: whether this server can serve it, and the command that does",
    ),
]


def inspect(
    context: typer.Context,
    path: _Inspected,
    server: _For = None,
    home: flags.HomeFlag = None,
    as_json: flags.JsonFlag = False,
) -> None:
    """Show what a bundle, return or plug-in is: lineage, sizes, settings, and whether it verifies in this home.

    If the artifact does not verify, the output has the reasons, and the command does not fail. In the home of the
    bundle's owner it also shows how much of the base the bundle has. For a study's folder it prints the tables of
    scores and gains.

    Example:
      offsite inspect bundle/
      offsite inspect plugged/ --for vllm
    """
    if server is not None:
        if server != "vllm":
            from offsite.errors import UsageError

            raise UsageError(f"--for {server} is unknown", next_step="write `offsite inspect PATH --for vllm`")
        terminal.show(_served(path, flags.home_of(context, home)), as_json=as_json)
        return
    if (results := _results_of_study(path)) is not None:
        from offsite.cli.study import show_results
        from offsite.study.report.read_results import read_results

        show_results(read_results(results), results.parent, as_json=as_json)
        return
    found = _inspected(path, flags.home_of(context, home))
    terminal.show(found, as_json=as_json)
    if found["verified"]:
        hint_next(found["kind"], path)
    else:
        terminal.hint_command("verify", path)


def verify(
    context: typer.Context, path: _Artifact, home: flags.HomeFlag = None, as_json: flags.JsonFlag = False
) -> None:
    """Verify signature, addressee, digests, names, shapes and dtypes; exits with 3 and every reason if it fails.

    Nothing of the artifact is run or loaded: files are hashed and headers read.

    Example:
      offsite verify bundle/
    """
    own = flags.home_of(context, home)
    artifact = _verified(path, own)
    manifest = artifact.manifest
    signer = manifest.signer if manifest.kind == "return" else manifest.issuer
    terminal.show(
        {
            "kind": manifest.kind,
            "path": str(path),
            "digest": artifact.digest,
            "signed_by": _party(signer, own),
            "verified": True,
        },
        as_json=as_json,
    )
    hint_next(artifact.manifest.kind, path)


def hint_next(kind: str, path: Path) -> None:
    """Print what is usually typed next for a verified artifact of this kind in the folder `path`."""
    following = {
        "bundle": ("tune", path, "--data", "train.jsonl", "--eval-data", "test.jsonl", "--out", "return/"),
        "return": ("plug-in", "base/", path, "--out", "plugged/", "--eval-data", "public.jsonl"),
        "plug-in": ("compare", "base/", path, "--data", "test.jsonl"),
    }
    terminal.hint_command(*following[kind])


def describe(artifact: "Bundle | Return | PlugIn", home: "Home") -> dict[str, Any]:
    """Describe a verified artifact as values that JSON can hold."""
    return {**_facts(artifact.folder, artifact.manifest, artifact.digest, home), "verified": True, "reasons": []}


def _results_of_study(path: Path) -> Path | None:
    """The file with the results of a study, if `path` is that file or the study's folder; else None."""
    from offsite.protocol.manifest import MANIFEST

    if path.is_file():
        return path if path.name == "results.json" else None
    results = path / "results.json"
    return results if results.is_file() and not (path / MANIFEST).exists() else None


def _inspected(path: Path, home: "Home") -> dict[str, Any]:
    """Describe an artifact, and say whether it verifies in this home and if not, why.

    Raises:
        UsageError: the folder is not an artifact.
        VerificationError: its manifest cannot be read.
    """
    from offsite.errors import OffsiteError
    from offsite.protocol.manifest import MANIFEST
    from offsite.protocol.verify import read_unverified
    from offsite.storage.files import sha256_of

    try:
        return describe(_verified(path, home), home)
    except OffsiteError as error:
        facts = _facts(path, read_unverified(path), sha256_of(path / MANIFEST), home)
        return {**facts, "verified": False, "reasons": list(error.reasons) or [error.what]}


def _served(path: Path, home: "Home") -> dict[str, Any]:
    """Describe a plug-in as `_inspected` does; if it verifies, with whether vLLM can serve it.

    Raises:
        UsageError: the folder is not a plug-in.
        VerificationError: its manifest cannot be read.
    """
    from offsite.errors import UsageError, VerificationError
    from offsite.model_owner.plugging_in.vllm_limits import vllm_limits
    from offsite.protocol.manifest import PlugInManifest
    from offsite.protocol.verify import read_unverified, verify_plug_in

    manifest = read_unverified(path)
    if not isinstance(manifest, PlugInManifest):
        raise UsageError(
            f"{path} is a {manifest.kind}, and --for is about plug-ins", next_step="name the plug-in's folder"
        )
    try:
        plugged = verify_plug_in(path, home)
    except VerificationError:
        return _inspected(path, home)
    return {**describe(plugged, home), "vllm": vllm_limits(plugged).facts}


def _facts(path: Path, manifest: "Manifest", digest: str, home: "Home") -> dict[str, Any]:
    """Describe an artifact from its manifest and the manifest's digest, whether or not it verifies."""
    from offsite.protocol.manifest import BundleManifest, ReturnManifest

    if isinstance(manifest, BundleManifest):
        facts = _bundle(manifest, digest, home)
    elif isinstance(manifest, ReturnManifest):
        facts = _return(manifest, digest, home)
    else:
        facts = _plug_in(manifest, digest, home)
    return {
        "kind": manifest.kind,
        "path": str(path),
        "digest": digest,
        "bytes": sum(entry.size for entry in manifest.files),
        **facts,
        "files": {entry.name: entry.size for entry in manifest.files},
    }


def describe_base(folder: Path) -> dict[str, Any]:
    """Describe a base folder as values that JSON can hold.

    Raises:
        StorageError: the folder holds no valid checkpoint.
    """
    from offsite.model_owner.importing.import_record import read_record
    from offsite.storage.checkpoint_folder import open_checkpoint

    checkpoint, record = open_checkpoint(folder), read_record(folder)
    return {
        "kind": "base",
        "path": str(folder),
        "bytes": checkpoint.size,
        "tensors": len(checkpoint.tensors),
        "dtypes": sorted({tensor.dtype for tensor in checkpoint.tensors.values()}),
        **({"imported": list(record.notes)} if record.notes else {}),
        **({"left_out": dict(record.left_out)} if record.left_out else {}),
    }


def last_losses(log: Path, trained: str, judged: str, same_rows: str | None = None) -> dict[str, Any]:
    """The measures of a run's last training step, and those before and after training, from its log.

    Args:
        log: the log of the run, a file that remains with the party that ran it.
        trained: the name of the log's event for a training step.
        judged: the name of the log's event for a validation on held-out data.
        same_rows: the name of the log's event for the loss on the rows of the first step; None if it has none.

    Returns:
        The number of steps, the measures by name, and the log's path; {} if the log has no training step. Measures on
        held-out data begin with "eval_", those on the first step's rows with "same_rows_"; of both, those before
        training end in "_before".
    """
    from offsite.training.run_log import last_record

    step = last_record(log, trained)
    if step is None:
        return {}
    found: dict[str, Any] = {"steps": step["step"], **{name: step[name] for name in _MEASURES if name in step}}
    for prefix, event in (("eval_", judged), ("same_rows_", same_rows)):
        before, after = (last_record(log, event, at) if event else None for at in (0, step["step"]))
        for name in _MEASURES:
            if after is not None and name in after:
                found |= {f"{prefix}{name}_before": before[name]} if before is not None else {}
                found[f"{prefix}{name}"] = after[name]
    return {**found, "log": str(log)}


_MEASURES = ("loss", "accuracy", "error", "ce")


def numbers_in(tensors: "Iterable[TensorEntry]") -> int:
    """The total number of values in some tensors."""
    import math

    return sum(math.prod(tensor.shape) for tensor in tensors)


def ranges(numbers: Sequence[int]) -> str:
    """Format ascending numbers as ranges in one text, e.g. 0-1, 10-11."""
    return ", ".join(terminal.number_ranges(numbers))


def _bundle(manifest: "BundleManifest", digest: str, home: "Home") -> dict[str, Any]:
    """The facts about a bundle: lineage, parties, split, and what a return may contain."""
    split = manifest.split
    return {
        "lineage": {"base": manifest.base, "bundle": digest},
        "issuer": _party(manifest.issuer, home),
        "recipient": _party(manifest.recipient, home),
        "issued_at": manifest.issued_at,
        "architecture": manifest.architecture,
        "split": split.model_dump(mode="json"),
        "blocks": {
            "verbatim": list(split.verbatim),
            "emulator": [index for index in range(split.blocks) if index not in split.verbatim],
        },
        "may_come_back": {
            "methods": list(manifest.methods),
            "max_rank": manifest.max_rank,
            "max_width": manifest.max_width,
            "head": bool(manifest.head),
            "blocks": list(split.trained),
            "tensors": len(manifest.tensors),
            "numbers": numbers_in(manifest.tensors.values()),
            "lora_targets": _by_linear_map(manifest),
        },
        **_owner_facts(digest, home),
    }


def _owner_facts(digest: str, home: "Home") -> dict[str, Any]:
    """What only the owner's ledger says of a bundle: the shares of the base's parameters, and the tuning's arithmetic.

    {} if this home's ledger does not record the bundle. `digest` is the bundle's.
    """
    from dataclasses import asdict

    from offsite.model_owner.ledger import Ledger

    issued = Ledger(home.ledger).issued(digest) if home.ledger.exists() else None
    facts: dict[str, Any] = {}
    if issued and issued.shares:
        facts["base_parameters"] = {name: round(share, 4) for name, share in issued.shares.fractions.items()}
    if issued and issued.arithmetic:
        share = {"share_of_lora_on_base": round(issued.arithmetic.share(), 4)}
        facts["tuning_multiply_adds_per_token"] = {**asdict(issued.arithmetic), **share}
    if issued and issued.score:
        facts["emulator_score"] = _emulator_score(issued.score)
    return facts


def _emulator_score(score: "EmulatorScore") -> dict[str, Any]:
    """The losses of base and untuned emulator on the same text, in nats per token, and their difference."""
    return {
        "base_loss": score.base_loss,
        "emulator_loss": score.emulator_loss,
        "difference": score.gap,
        "interval": {"low": score.low, "high": score.high},
        "tokens": score.tokens,
        "text": score.text,
        "fitted": score.fitted,
    }


def _by_linear_map(manifest: "BundleManifest") -> dict[str, list[int]]:
    """The linear layers that may get LoRA: for each path inside a block, the indices of the bundle's blocks."""
    family = manifest.family
    blocks: dict[str, list[int]] = {}
    for index, path in sorted(place for name in manifest.lora_targets if (place := family.linear_layer_of(name))):
        blocks.setdefault(path, []).append(index)
    return blocks


def _return(manifest: "ReturnManifest", digest: str, home: "Home") -> dict[str, Any]:
    """The facts about a return: lineage, parties, method and its settings, checkpoints, and number of tensors."""
    lora = manifest.lora
    return {
        "lineage": {"bundle": manifest.bundle, "return": digest},
        "signer": _party(manifest.signer, home),
        "recipient": _party(manifest.recipient, home),
        "method": manifest.method,
        "lora": {"rank": lora.rank, "alpha": lora.alpha, "targets": len(lora.targets)} if lora else None,
        "bottleneck": {"width": manifest.bottleneck.width} if manifest.bottleneck else None,
        "head": manifest.head,
        "checkpoints": manifest.checkpoints,
        "scores": [round(score, 6) for score in manifest.scores] if manifest.scores else None,
        "tensors": len(manifest.tensors),
        "numbers": numbers_in(manifest.tensors.values()),
        **({"classes": list(manifest.classes)} if manifest.classes else {}),
    }


def _plug_in(manifest: "PlugInManifest", digest: str, home: "Home") -> dict[str, Any]:
    """The facts about a plug-in: lineage, issuer, form, checkpoint, strength and model type."""
    return {
        "lineage": {
            "base": manifest.base,
            "bundle": manifest.bundle,
            "return": manifest.returned,
            "plug-in": digest,
        },
        "issuer": _party(manifest.issuer, home),
        "form": manifest.form,
        "checkpoint": manifest.checkpoint,
        "strength": manifest.strength,
        "architecture": manifest.architecture,
    }


def _party(key: str, home: "Home") -> dict[str, str | None]:
    """The fingerprint of a public key, and its name in this home; the name is None if the key is not trusted here."""
    from offsite.errors import OffsiteError
    from offsite.protocol.signing import PublicKey

    names = {known.hex: name for name, known in home.trusted().items()}
    try:
        own = home.identity()
        names[own.public_key.hex] = f"{own.name} (this home)"
    except OffsiteError:  # a home without a key can still inspect artifacts
        pass
    return {"name": names.get(key), "key": PublicKey.from_hex(key).fingerprint}


def _verified(path: Path, home: "Home") -> "Bundle | Return | PlugIn":
    """Verify an artifact; a return to this party is also checked against its bundle in the ledger."""
    from offsite.model_owner.intake import check_return
    from offsite.protocol.manifest import ReturnManifest
    from offsite.protocol.verify import read_unverified
    from offsite.protocol.verify import verify as verify_stage

    manifest = read_unverified(path)
    if isinstance(manifest, ReturnManifest) and manifest.recipient == home.identity().public_key.hex:
        return check_return(path, home)
    return verify_stage(path, home)
