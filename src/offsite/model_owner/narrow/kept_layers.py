"""The inputs and outputs that each layer of a narrowed block keeps, for the map in the owner's ledger. Torch-free."""

from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.carry_map import KeptFeatures, Narrowed
from offsite.model_owner.narrow.even_widths import base_widths
from offsite.models.block_widths import Kept, kept_rows_and_columns


def kept_layers(model: BaseModel, index: int, kept: Kept) -> Narrowed:
    """The features that stay of a narrowed block's linear layers, keyed by path in the block; whole layers left out.

    Args:
        model: the opened base.
        index: the block's base index.
        kept: the heads and neurons that stay.
    """
    base, tensors, found = base_widths(model, index), model.block(index), {}
    for path in model.family.linears:
        if f"{path}.weight" in tensors:
            shape = tensors[f"{path}.weight"].shape
            outputs, inputs = kept_rows_and_columns(model.family, path, shape, base, kept)
            if outputs is not None or inputs is not None:
                found[path] = KeptFeatures(inputs=inputs, outputs=outputs)
    return found
