"""Lists the inputs and outputs that remain in each layer of a narrowed block, for its `CarryMap`. Torch-free.

The experts that remain are the outputs of the router.
"""

from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.carry_map import KeptFeatures, Narrowed
from offsite.model_owner.narrow.even_widths import base_widths
from offsite.models.block_widths import Kept, kept_rows_and_columns, router_of


def kept_layers(model: BaseModel, index: int, kept: Kept) -> Narrowed:
    """The inputs and outputs that remain in each linear layer of a narrowed block, keyed by the layer's path in it.

    Layers that lose none are left out.

    Args:
        model: the opened base.
        index: the block's index in the base.
        kept: the indices of the heads, neurons and experts that remain.
    """
    base, tensors, found = base_widths(model, index), model.block(index), {}
    for path in model.family.linears:
        if f"{path}.weight" in tensors:
            shape = tensors[f"{path}.weight"].shape
            outputs, inputs = kept_rows_and_columns(model.family, path, shape, base, kept)
            if outputs is not None or inputs is not None:
                found[path] = KeptFeatures(inputs=inputs, outputs=outputs)
    router = router_of(model.family)
    if router is not None and len(kept.experts) < base.experts:
        found[router.removesuffix(".weight")] = KeptFeatures(outputs=kept.experts)
    return found
