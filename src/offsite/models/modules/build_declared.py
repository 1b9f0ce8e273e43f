"""Builds the model of a bundle whose emulator declares modules.

It is the family's model, in which modules of the emulator are replaced, such as linear layers by quantised ones.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from offsite.models.block_widths import widths_of
from offsite.models.empty_weights import without_weights
from offsite.models.families.architectures import architecture_of
from offsite.models.families.family import Architecture
from offsite.models.mixture import block_in_files, block_in_modules, experts_implementation
from offsite.models.modules.affine_map import Affine, stand_behind
from offsite.models.modules.compressed_linear import FactoredLinear, QuantisedLinear, unpacked
from offsite.models.modules.declared import Declared
from offsite.models.modules.narrow_block import narrow_block

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build(
    config: Mapping[str, Any], declared: Declared, tensors: dict[str, Tensor], attention: str
) -> tuple["PreTrainedModel", list[str]]:
    """Build the model of a bundle whose emulator has modules that differ from the family's.

    Args:
        config: the family's config for all blocks of the bundle.
        declared: which modules of the emulator differ, and how.
        tensors: all tensors, by name in the checkpoint files, floats in the compute dtype; used entries are removed.
        attention: transformers' name for the attention implementation.

    Returns:
        The model, and a message for each tensor that is missing, unexpected or of a wrong shape.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    family = architecture_of(config)
    made = AutoConfig.for_model(**config)
    with without_weights():
        model: Any = AutoModelForCausalLM.from_config(
            made, attn_implementation=attention, experts_implementation=experts_implementation()
        )
    blocks: Any = model.get_submodule(family.blocks)
    emulator = range(declared.first, declared.first + declared.blocks)
    problems: list[str] = []
    for place in range(len(blocks)):
        if place not in emulator:
            weights = block_in_modules(family, _pop_block_tensors(family, place, tensors))
            problems += _assign(blocks[place], weights, family.in_block(place, ""))
    owned: dict[int, dict[str, Tensor]] = {}
    for at, place in enumerate(emulator):
        owner = declared.share[at] if declared.share else at
        if owner not in owned:
            owned[owner] = _pop_block_tensors(family, declared.first + owner, tensors)
        # one tensor in all places that share it, except biases, which may train in the place that holds them
        copies = at != owner
        weights = {path: one.clone() if copies and path.endswith("bias") else one for path, one in owned[owner].items()}
        if declared.narrows:
            parameters = block_in_files(family, dict(blocks[place].named_parameters()))
            shapes = {path: tuple(value.shape) for path, value in parameters.items()}
            base = widths_of(family, config, shapes)
            narrow_block(blocks[place], family, shapes, base, declared.widths(base, at))
        problems += _unpack(blocks[place], family, declared, weights, family.in_block(place, ""))
        _replace_compressed_linears(blocks[place], family, declared, weights)
        if declared.affine:
            stand_behind(blocks[place], Affine.empty(made.hidden_size))
        problems += _assign(blocks[place], block_in_modules(family, weights), family.in_block(place, ""))
    for name in family.outer_tensors(config) & tensors.keys():
        path, _, leaf = name.rpartition(".")
        # a head has another name in some families' modules than in their files
        owner = model.get_output_embeddings() if name == family.head else model.get_submodule(path)
        setattr(owner, leaf, nn.Parameter(tensors.pop(name), requires_grad=False))
    model.tie_weights()
    problems += [f"unexpected tensor {name}" for name in sorted(tensors)]
    problems += [f"missing tensor {name}" for name, value in model.named_parameters() if value.is_meta]
    return model, list(dict.fromkeys(problems))


def _pop_block_tensors(family: Architecture, place: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the tensors of the bundle's block with index `place`, and return them by path in the block."""
    start = family.in_block(place, "")
    return {name.removeprefix(start): tensors.pop(name) for name in sorted(tensors) if name.startswith(start)}


def _unpack(
    block: nn.Module, family: Architecture, declared: Declared, weights: dict[str, Tensor], start: str
) -> list[str]:
    """Replace each sparse matrix in `weights` (a mask and values) by the full matrix.

    Returns a message for each mask that does not fit its values; `start` is the block's full path, with a dot.
    """
    problems = []
    for path in family.linears if declared.sparse is not None else ():
        if f"{path}.mask" not in weights or f"{path}.values" not in weights:
            continue  # the caller reports the missing tensor
        mask, values = weights.pop(f"{path}.mask"), weights.pop(f"{path}.values")
        full = unpacked(mask, values, _inputs(block.get_submodule(path), family))
        if full is None:
            problems.append(f"{start}{path}.mask does not have a place for each of the {len(values)} values")
        else:
            weights[f"{path}.weight"] = full.T.contiguous() if family.transposed else full
    return problems


def _replace_compressed_linears(
    block: nn.Module, family: Architecture, declared: Declared, weights: dict[str, Tensor]
) -> None:
    """Replace the linear layers of a block whose weights are quantised or factored by modules for that form.

    The weights of these layers, and their biases, are removed from `weights`.
    """
    for path in family.linears:
        parent, _, name = path.rpartition(".")
        bias = weights.get(f"{path}.bias")
        if f"{path}.quantised" in weights and declared.group:
            codes, scales = weights.pop(f"{path}.quantised"), weights.pop(f"{path}.scales")
            inputs = _inputs(block.get_submodule(path), family)
            made: nn.Module = QuantisedLinear(codes, scales, bias, inputs, declared.group)
        elif f"{path}.down" in weights:
            made = FactoredLinear(weights.pop(f"{path}.down"), weights.pop(f"{path}.up"), bias)
        else:
            continue
        weights.pop(f"{path}.bias", None)
        setattr(block.get_submodule(parent), name, made)


def _inputs(linear: Any, family: Architecture) -> int:
    """The number of inputs of a linear layer of this family."""
    return int(linear.weight.shape[0] if family.transposed else linear.weight.shape[1])


def _assign(block: nn.Module, weights: Mapping[str, Tensor], start: str) -> list[str]:
    """Assign tensors to the parameters of a block; `weights` has them by the parameter's path in the block.

    Returns a message for each that does not fit; `start` is the block's full path, with a dot.
    """
    problems = []
    own = dict(block.named_parameters())
    for path, value in weights.items():
        if path not in own:
            problems.append(f"unexpected tensor {start}{path}")
        elif own[path].shape != value.shape:
            problems.append(f"{start}{path} has shape {list(value.shape)}, expected {list(own[path].shape)}")
        elif own[path].is_meta or own[path] is not value:
            parent, _, leaf = path.rpartition(".")
            setattr(block.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))
    return problems
