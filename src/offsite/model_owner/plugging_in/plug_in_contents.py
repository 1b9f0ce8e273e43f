"""The content of a plug-in, as an adapter or as a complete checkpoint: named tensors and other files. Torch-free.

Tensors are computed only when they are written, so a plan can use the same object to get every size.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from offsite.model_owner.base_model import BaseModel, by_todays_names
from offsite.model_owner.plugging_in.check_plug_in import Form
from offsite.model_owner.plugging_in.image_classifier import classifier_config, classifier_tensors
from offsite.model_owner.plugging_in.plugged_tensors import Chosen, adapter_tensors, changed_tensors, to_base
from offsite.model_owner.plugging_in.whole_checkpoint import whole_files, whole_tensors
from offsite.models.quantisation import plain_config
from offsite.protocol.contents import (
    ADAPTER_CONFIG,
    BESIDE_A_MODEL,
    CONFIG,
    GENERATION_CONFIG,
    PROCESSOR,
    TOKENIZER_FILES,
    WEIGHTS_OF,
)
from offsite.protocol.manifest import FORMAT, FileEntry, PlugInManifest
from offsite.protocol.peft_adapter import adapter_config
from offsite.storage.checkpoint_folder import checkpoint_bytes, open_checkpoint, write_checkpoint
from offsite.storage.files import Written, write_stream
from offsite.storage.safetensors_files import NewTensor, TensorRange, copied, safetensors_bytes, write_safetensors
from offsite.storage.strict_json import strict_json

# Files other than weights that a merged plug-in copies from the base.
_COMPANIONS = (CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES, *BESIDE_A_MODEL)


@dataclass(frozen=True)
class Contents:
    """Everything in a plug-in except its manifest and signature."""

    weights: str | None  # file name of an adapter's tensors; None for a checkpoint
    tensors: Sequence[NewTensor]
    others: Mapping[str, bytes]  # contents of all other files, keyed by name

    def write(self, folder: Path) -> list[Written]:
        """Compute the tensors and write all files to a folder.

        Returns:
            The name, size and digest of each file.

        Raises:
            VerificationError: a changed tensor is not finite in its dtype.
        """
        if self.weights is None:
            written = write_checkpoint(folder, self.tensors)
        else:
            written = [write_safetensors(folder / self.weights, self.tensors)]
        return written + [write_stream(folder / name, [content]) for name, content in self.others.items()]

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every file in bytes, keyed by file name."""
        if self.weights is None:
            weights = checkpoint_bytes(self.tensors)
        else:
            weights = {self.weights: safetensors_bytes(self.tensors)}
        return weights | {name: len(content) for name, content in self.others.items()}


def plug_in_contents(model: BaseModel, chosen: Chosen, form: Form, whole: Path | None = None) -> Contents:
    """The content of a plug-in.

    Args:
        model: the opened base.
        chosen: the checkpoint of the return to plug in, and its strength.
        form: "adapter" or "merged".
        whole: the folder of the multi-modal checkpoint that the base was imported from, to merge the return into that
            checkpoint; None to merge it into the base.
    """
    if form == "adapter":
        return adapter_contents(model, chosen)
    changes = changed_tensors(model, chosen)
    if whole is not None:
        return Contents(None, whole_tensors(model, changes, whole), whole_files(whole))
    if model.family.vision is not None:
        tensors = classifier_tensors(model, model.family.vision, changes, chosen.returned)
        config = classifier_config(model, model.family.vision, chosen.returned.manifest.classes or ())
        return Contents(None, tensors, {CONFIG: config, **_companions(model, (PROCESSOR, "LICENSE", "LICENSE.txt"))})
    tensors = []
    for stored in open_checkpoint(model.folder).tensors.values():
        parts = by_todays_names(model.family, stored)
        new = [changes.get(name) or copied(part) for name, part in parts.items()]
        tensors.append(_joined(stored, new) if changes.keys() & parts.keys() else copied(stored))
    return Contents(None, tensors, {**_companions(model, _COMPANIONS), CONFIG: _plain_config(model.folder)})


def adapter_contents(model: BaseModel, chosen: Chosen) -> Contents:
    """The content of a plug-in in the form of an adapter for the base: its tensors, and for LoRA PEFT's config."""
    manifest = chosen.returned.manifest
    others = {}
    if manifest.lora:
        targets = tuple(to_base(target, model, chosen.parent, target=True) for target in manifest.lora.targets)
        lora = manifest.lora.model_copy(update={"targets": targets})
        config = adapter_config(lora, model.family, head=manifest.head)
        others[ADAPTER_CONFIG] = json.dumps(config, indent=1).encode() + b"\n"
    return Contents(WEIGHTS_OF[manifest.method], adapter_tensors(model, chosen), others)


def plug_in_manifest(
    model: BaseModel, chosen: Chosen, form: Form, strength: float, issuer: str, files: tuple[FileEntry, ...]
) -> PlugInManifest:
    """The manifest of a plug-in with these files.

    Args:
        model: the opened base.
        chosen: the checkpoint of the return that is plugged in, and its strength.
        form: "adapter" or "merged".
        strength: the strength in the settings.
        issuer: the owner's key, 64 hex digits.
        files: the plug-in's files.
    """
    return PlugInManifest(
        kind="plug-in",
        format=FORMAT,
        requires=(),
        form=form,
        architecture=model.family.model_type,
        base=chosen.parent.manifest.base,
        bundle=chosen.parent.digest,
        returned=chosen.returned.digest,
        strength=strength,
        checkpoint=chosen.checkpoint,
        issuer=issuer,
        files=files,
    )


def _plain_config(folder: Path) -> bytes:
    """The content of a folder's config.json without quantisation settings, with which plain weights would not load."""
    content = (folder / CONFIG).read_bytes()
    found = strict_json(content)
    return content if plain_config(found) == found else json.dumps(plain_config(found), indent=1).encode() + b"\n"


def _companions(model: BaseModel, names: Sequence[str]) -> dict[str, bytes]:
    """The contents of those of the named files that the base folder has, keyed by name."""
    return {name: (model.folder / name).read_bytes() for name in names if (model.folder / name).is_file()}


def _joined(stored: TensorRange, parts: Sequence[NewTensor]) -> NewTensor:
    """A new tensor in place of one in the base's files, with the bytes of its parts one after the other.

    The parts are the tensor itself, or the matrices of the experts that the file stores in one tensor.
    """
    return NewTensor(
        stored.name, stored.dtype, stored.shape, lambda: chain.from_iterable(part.chunks() for part in parts)
    )
