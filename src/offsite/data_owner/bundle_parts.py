"""Lists the parts of a bundle with their sizes: embeddings, trained and frozen blocks, final norm, head. Torch-free."""

from collections.abc import Mapping

from offsite.models.plan_amounts import Part, part
from offsite.protocol.manifest import BundleManifest
from offsite.storage.safetensors_files import ITEM_SIZE, TensorRange


def bundle_parts(manifest: BundleManifest, tensors: Mapping[str, TensorRange]) -> tuple[Part, ...]:
    """The parts of a bundle with their sizes, computed from the headers of its weights.

    Args:
        manifest: the bundle's manifest, which says how the model is split.
        tensors: the tensors in the bundle's weights, by name.
    """
    family, split = manifest.family, manifest.split
    inside = {"trained in between": len(split.spread)} if split.spread else {}
    blocks = {"bottom": split.bottom, "emulator": split.emulator - len(split.spread), **inside, "top": split.top}
    held: dict[str, list[TensorRange]] = {name: [] for name in ("embeddings", *blocks, "final norm", "head")}
    for name, tensor in tensors.items():
        place = family.block_of(name)
        if place is None:
            where = "embeddings" if name in family.embeddings else "head" if name == family.head else "final norm"
        elif place[0] in split.spread:
            where = "trained in between"
        else:
            index = place[0]
            where = "bottom" if index < split.bottom else "emulator" if index < split.bottom + split.emulator else "top"
        held[where].append(tensor)
    return tuple(
        part(name, [one.shape for one in there], ITEM_SIZE[there[0].dtype] if there else 1, blocks.get(name, 0))
        for name, there in held.items()
    )
