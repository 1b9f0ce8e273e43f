"""Remove heads, MLP neurons or experts from a block of a model; the family's own forward code runs the block."""

from typing import Any

import torch
from torch import nn

from offsite.models.block_widths import Shapes, Widths, narrowed_shapes, router_of
from offsite.models.families.family import Architecture


class _NarrowConfig:
    """A view of a model's config with other numbers of heads.

    It is for attention modules that read these numbers from the config; all other values are the model's.
    """

    def __init__(self, config: Any, **numbers: int) -> None:
        self.__dict__.update(numbers, _whole=config)

    def __getattr__(self, name: str) -> Any:
        if name == "_whole":  # a copy that is being made has nothing yet
            raise AttributeError(name)
        return getattr(self._whole, name)


def narrow_block(block: nn.Module, family: Architecture, shapes: Shapes, base: Widths, widths: Widths) -> None:
    """Make a block narrower, in place.

    Tensors whose shape changes are on the meta device afterwards; the caller must assign them.

    Args:
        block: a block of the family's own form.
        family: the model's family.
        shapes: the shapes of the block's tensors, by path in the block as in checkpoint files.
        base: the widths of the block before.
        widths: the widths of the block after.
    """
    if widths == base:
        return
    parameters = dict(block.named_parameters())
    for path, shape in narrowed_shapes(family, shapes, base, widths).items():
        name = family.modules.get(path, path)
        if name in parameters and parameters[name].shape != shape:
            _resize(block, name, shape)
    if widths.experts < base.experts:
        _shorten_experts(block, family, widths.experts)
    if widths.heads < base.heads:
        name = family.modules.get(f"{family.attention_out}.weight", f"{family.attention_out}.weight")
        attention = block.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
        _set_head_counts(attention, widths)


def _resize(block: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    """Replace a parameter of a block by one of another shape on the meta device, and set the sizes of its layer."""
    path, _, leaf = name.rpartition(".")
    layer: Any = block.get_submodule(path)
    setattr(layer, leaf, nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False))
    if leaf != "weight":
        return
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = shape
    elif hasattr(layer, "nf"):  # GPT-2's Conv1D stores (inputs, outputs)
        layer.nx, layer.nf = shape


def _shorten_experts(block: nn.Module, family: Architecture, count: int) -> None:
    """Shorten the stacks of experts to `count`, and set this number in their module and in the router."""
    router = router_of(family)
    if family.experts is None or router is None:
        return
    experts = block.get_submodule(family.experts.module)
    for leaf in family.experts.stacks:
        shape = tuple(experts.get_parameter(leaf).shape)
        _resize(experts, leaf, (count, *shape[1:]))
    for module in (experts, block.get_submodule(family.modules.get(router, router).rpartition(".")[0])):
        if hasattr(module, "num_experts"):
            module.num_experts = count  # type: ignore[assignment]


def _set_head_counts(attention: Any, widths: Widths) -> None:
    """Set the numbers of heads of an attention module, under each name by which a family stores them."""
    heads, groups = widths.heads, widths.groups
    numbers = {
        **dict.fromkeys(("num_heads", "num_attention_heads"), heads),
        **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), groups),
        "num_key_value_groups": heads // groups,
        "split_size": heads * widths.head_size,
    }
    for name, number in numbers.items():
        if hasattr(attention, name):
            setattr(attention, name, number)
    for name, number in (("q_layernorm", heads), ("k_layernorm", groups)):
        norms = getattr(getattr(attention, name, None), "norms", None)
        if norms is not None:  # one for each head
            del norms[number:]
            getattr(attention, name).num_heads = number
    if not hasattr(attention, "num_heads") and hasattr(attention, "config"):
        attention.config = _NarrowConfig(attention.config, num_attention_heads=heads, num_key_value_heads=groups)
