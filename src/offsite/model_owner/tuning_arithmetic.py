"""Counts the arithmetic of tuning a bundle by adapters, as a share of LoRA on every block of the base. Torch-free.

Counted are the multiply-adds of the frozen linear layers: the forward pass through every block, the gradient of a
layer's input from the lowest trained block up, and the head in both directions for each labelled token. Left out are
the products of attention, the adapter's own pairs, norms and activations, which are small beside them or the same for
both. A zero that is pruned counts like any other weight, and so does a weight that is stored in few bits: they save
size, not multiply-adds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.narrow.even_widths import block_shapes
from offsite.models.block_widths import multiply_adds
from offsite.models.modules.declared import Declared
from offsite.protocol.manifest import Split


@dataclass(frozen=True)
class TuningArithmetic:
    """Multiply-adds of linear layers for one token, of a bundle and of its base."""

    forward: int  # through all blocks of the bundle
    backward: int  # for the gradients of inputs, from the bundle's lowest trained block up
    verbatim: int  # forward through the blocks that are sent uncompressed, which can train whole
    base: int  # forward through all blocks of the base; the gradients of inputs need as many
    head: int  # of one labelled token; 0 for an image encoder, whose classifier is small

    def share(self, labelled: float = 0.0, *, whole_blocks: bool = False) -> float:
        """The bundle's multiply-adds of a training step, as a share of those of LoRA on every block of the base.

        Args:
            labelled: labelled tokens as a share of all tokens of the training rows; 0 leaves out the head.
            whole_blocks: whether all weights of the uncompressed blocks train, whose gradients are then counted too.
        """
        head = 2 * labelled * self.head
        weights = self.verbatim if whole_blocks else 0
        return (self.forward + self.backward + weights + head) / (2 * self.base + head)


def count_tuning_arithmetic(
    model: BaseModel, kept: Sequence[int], split: Split, declared: Declared | None
) -> TuningArithmetic | None:
    """Count the multiply-adds of tuning a bundle, from the shapes of the base's tensors and the bundle's declaration.

    None for a derived family with experts or convolutions: how often a token uses these weights is not known.

    Args:
        model: the opened base.
        kept: base indices of the bundle's blocks, in order.
        split: the manifest's split, which says which blocks of the bundle may train.
        declared: what the bundle's config declares of blocks that differ from the family's; None if none does.
    """
    if not _countable(model):
        return None
    blocks = []
    for index, base in enumerate(kept):
        compressed = split.bottom <= index < split.bottom + split.emulator and index not in split.verbatim
        blocks.append(_block(model, base, declared if compressed else None, index - split.bottom))
    lowest = min(split.trained, default=len(blocks))
    head = 0
    if model.family.vision is None:
        name = model.family.head if model.family.head in model.tensors else next(iter(model.family.embeddings))
        head = math.prod(model.tensors[name].shape)
    verbatim = sum(blocks[index] for index in split.verbatim)
    whole = sum(_block(model, index, None, 0) for index in range(model.blocks))
    return TuningArithmetic(sum(blocks), sum(blocks[lowest:]), verbatim, whole, head)


def _countable(model: BaseModel) -> bool:
    """Whether a token uses each weight of the linear layers once, apart from experts of a family of the table."""
    if not model.family.layouts:
        return True
    shapes = (shape for index in range(model.blocks) for shape in _linear_shapes(model, index))
    return model.family.experts is None and all(len(shape) == 2 for shape in shapes)


def _linear_shapes(model: BaseModel, index: int) -> list[tuple[int, ...]]:
    """The shapes of the weights of a base block's linear layers; `index` is the block's."""
    family = model.family
    return [
        shape for path, shape in block_shapes(model, index).items() if family.is_linear(family.in_block(index, path))
    ]


def _block(model: BaseModel, base_index: int, declared: Declared | None, place: int) -> int:
    """The multiply-adds of one block's linear layers for one token, forward.

    Args:
        model: the opened base.
        base_index: the block's index in the base.
        declared: how the emulator's blocks differ from the family's; None for a block of the family's own form.
        place: the block's index in the emulator.
    """
    shapes, family = block_shapes(model, base_index), model.family
    chosen = family.chosen_experts(model.config) if family.experts else 0
    if declared is None:
        return multiply_adds(family, shapes, chosen)
    shapes = declared.narrowed(family, model.config, shapes, place)
    if declared.svd_rank is not None:
        for path in family.linears:
            inputs, outputs = shapes[f"{path}.weight"]
            shapes[f"{path}.weight"] = (declared.rank(inputs, outputs), inputs + outputs)
    affine = 0
    if declared.affine:
        hidden = shapes[f"{family.attention_out}.weight"][1 if family.transposed else 0]
        affine = hidden * hidden
    return multiply_adds(family, shapes, chosen) + affine
