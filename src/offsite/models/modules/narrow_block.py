"""Make a block of a family narrower: fewer attention heads, MLP neurons, experts. The family's own code runs it."""

from typing import Any

import torch
from torch import nn

from offsite.models.block_widths import Shapes, Widths, narrowed_shapes, router_of
from offsite.models.family import Architecture


class _NarrowConfig:
    """A config with other numbers of heads, for attention that reads them there; all else is the model's config."""

    def __init__(self, config: Any, **numbers: int) -> None:
        self.__dict__.update(numbers, _whole=config)

    def __getattr__(self, name: str) -> Any:
        if name == "_whole":  # a copy that is being made has nothing yet
            raise AttributeError(name)
        return getattr(self._whole, name)


def narrow_block(block: nn.Module, family: Architecture, shapes: Shapes, base: Widths, widths: Widths) -> None:
    """Make a block narrower, in place; its tensors of other shapes get no values, and must be assigned afterwards.

    Args:
        block: a block of the family's own form.
        family: the model's row of the architecture table.
        shapes: the shapes of the block's tensors, keyed by their path in files.
        base: the block's widths.
        widths: the widths that it gets.
    """
    if widths == base:
        return
    parameters = dict(block.named_parameters())
    for path, shape in narrowed_shapes(family, shapes, base, widths).items():
        name = family.modules.get(path, path)
        if name in parameters and parameters[name].shape != shape:
            _resize(block, name, shape)
    if widths.experts < base.experts:
        _count_experts(block, family, widths.experts)
    if widths.heads < base.heads:
        name = family.modules.get(f"{family.attention_out}.weight", f"{family.attention_out}.weight")
        attention = block.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
        _count_heads(attention, widths)


def _resize(block: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    path, _, leaf = name.rpartition(".")
    layer: Any = block.get_submodule(path)
    setattr(layer, leaf, nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False))
    if leaf != "weight":
        return
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = shape
    elif hasattr(layer, "nf"):  # GPT-2's Conv1D stores (inputs, outputs)
        layer.nx, layer.nf = shape


def _count_experts(block: nn.Module, family: Architecture, count: int) -> None:
    """Shorten the stacks of experts, and set the numbers of experts that they and the router hold."""
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


def _count_heads(attention: Any, widths: Widths) -> None:
    """Set the numbers of heads that an attention module holds."""
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
