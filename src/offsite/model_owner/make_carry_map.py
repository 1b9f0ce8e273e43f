"""Makes the `CarryMap` of a new bundle, which maps its blocks and layers to those of the base."""

from collections.abc import Sequence
from pathlib import Path

from offsite.config import PackSpec
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.carry_map import CarryMap, Narrowed
from offsite.model_owner.compress.smallest_weights import Array
from offsite.model_owner.compress.stored_form_protocol import BlockReshaping, form_of
from offsite.model_owner.heal.heal_steps import Healed
from offsite.model_owner.narrow.kept_layers import kept_layers
from offsite.models.modules.declared import Declared
from offsite.protocol.manifest import BundleManifest
from offsite.storage.checkpoint_folder import open_checkpoint
from offsite.storage.safetensors_files import read_chunks, read_float32


def make_carry_map(
    model: BaseModel,
    kept: Sequence[int],
    healed: Healed,
    declared: Declared | None,
    spec: PackSpec,
    manifest: BundleManifest,
    folder: Path,
) -> CarryMap:
    """Make the map from a bundle's blocks and layers to the base's, after the bundle's weights were written.

    Args:
        model: the opened base.
        kept: base indices of the bundle's blocks, in order.
        healed: the tensors that replace the base's, and which heads, neurons and experts remain in narrowed blocks.
        declared: what the bundle's config declares of blocks that differ from the family's; None if none does.
        spec: the settings of packing.
        manifest: the bundle's manifest.
        folder: the folder with the bundle's weights.
    """
    adapted = manifest.split.adapted
    narrowed = (
        {index: narrowed_layers(model, kept[index], healed, declared, spec) for index in adapted} if declared else {}
    )
    whole = {
        name for name in manifest.tensors if (place := model.family.block_of(name)) is not None and place[0] in adapted
    }
    written = open_checkpoint(folder).tensors if whole else {}
    shipped = {name: b"".join(read_chunks(written[name])) for name in sorted(whole)}
    return CarryMap.of(kept, {index: layers for index, layers in narrowed.items() if layers}, shipped)


def narrowed_layers(model: BaseModel, block: int, healed: Healed, declared: Declared, spec: PackSpec) -> Narrowed:
    """The indices in the base of the inputs and outputs that each narrowed layer of a block still has.

    They are keyed by the layer's path in the block.

    Args:
        model: the opened base.
        block: the block's index in the base.
        healed: the tensors that replace the base's, and what remains of narrowed blocks.
        declared: the part of the bundle's config that describes narrowed or otherwise changed blocks.
        spec: the settings of packing.
    """
    if block in healed.kept:
        return kept_layers(model, block, healed.kept[block])
    tensors = model.block(block)

    def read(path: str) -> Array:
        return read_float32(healed.tensors.get(model.family.in_block(block, path), tensors[path]))

    forms = [form for form in map(form_of, spec.stored_forms) if isinstance(form, BlockReshaping)]
    return {
        path: features for form in forms for path, features in form.kept_features(model.family, read, declared).items()
    }
