"""Writes the return: trained tensors, settings, manifest, signature.

Besides the trained tensors, the only facts about the data in it are names of classes and, if requested, held-out
losses.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from offsite.config import TuneSpec
from offsite.data_owner.return_manifest import adapter_settings, return_manifest
from offsite.data_owner.returned_checkpoints import Checkpoints
from offsite.errors import OffsiteError
from offsite.models.image_encoder import BIAS, WEIGHT
from offsite.protocol.artifacts import Bundle, Return
from offsite.protocol.contents import ADAPTER_CONFIG, CLASSIFIER, WEIGHTS_OF
from offsite.protocol.sealing import file_entries, seal
from offsite.protocol.signing import Identity
from offsite.storage.files import staged_folder, write_stream
from offsite.storage.safetensors_files import copied, finite, read_header, write_safetensors
from offsite.training.resume_points import removal_of, to_new_tensor
from offsite.training.run_log import run_folder


def write_return(
    bundle: Bundle,
    tensors: Mapping[str, torch.Tensor],
    spec: TuneSpec,
    out: Path,
    identity: Identity,
    checkpoints: Checkpoints,
    classes: tuple[str, ...] | None = None,
) -> Return:
    """Write and sign a return.

    Args:
        bundle: the bundle that was tuned.
        tensors: the trained fp32 tensors, by their names in the return, including those of a classifier.
        spec: the settings of the tuning.
        out: the return's folder; it appears complete or not at all.
        identity: the identity of the bundle's recipient, who signs.
        checkpoints: the earlier checkpoints, and the scores that the return reports.
        classes: the names of the classifier's classes; None if there is no classifier.

    Raises:
        OffsiteError: a tensor holds NaN or infinity; nothing is signed.
        UsageError: `out` is not empty.
        StorageError: the return cannot be written; `out` is then unchanged.
    """
    head = {name: tensor for name, tensor in tensors.items() if name in (WEIGHT, BIAS)} if classes else {}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in head}
    broken = sorted(name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all()))
    earlier = {file.name: read_header(file) for file in checkpoints.earlier}
    for file, held in earlier.items():
        broken += [f"{name} of {file}" for name, tensor in held.items() if not finite(tensor)]
    if broken:
        raise OffsiteError(
            "the trained weights hold NaN or infinity, so they are not sent",
            reasons=broken,
            next_step=f"tune again with a lower --lr{removal_of(run_folder(out))}",
        )
    with staged_folder(out) as staging:
        ordered = [to_new_tensor(name, tensors[name]) for name in sorted(tensors)]
        written = [write_safetensors(staging / WEIGHTS_OF[spec.adapter.method], ordered)]
        if head:
            written.append(write_safetensors(staging / CLASSIFIER, [to_new_tensor(*pair) for pair in head.items()]))
        for file, held in earlier.items():
            written.append(write_safetensors(staging / file, [copied(tensor) for tensor in held.values()]))
        if spec.adapter.method == "lora":
            written.append(write_stream(staging / ADAPTER_CONFIG, [adapter_settings(bundle.manifest, spec)]))
        files, signer = file_entries(written), identity.public_key.hex
        manifest = return_manifest(bundle, spec, signer, files, classes=classes, scores=checkpoints.scores)
        return seal(staging, manifest, identity, out)
