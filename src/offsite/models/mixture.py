"""Mixtures of experts in torch: the forward pass of the experts, and parameters under the tensor names of files.

Transformers has three implementations, each with a problem. Its loop indexes the stack once per expert, so the gradient
costs a whole stack per expert (full tuning with 64 experts: ten times the time per step); `grouped_mm` needs rows of 16
bytes; `batched_mm` copies an expert for every token. The loop in this file unbinds the stacks once. Its output equals
that of transformers' loop bit for bit and is the same in every run. It is registered through transformers' own
interface; nothing is patched.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from offsite.models.families.family import Architecture

_NAME = "offsite_experts"


def experts_implementation() -> str:
    """Register this file's loop over experts with transformers, and return its name for `experts_implementation`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(_NAME, _run)
    return _NAME


def _run(
    experts: Any,  # a module with stacks gate_up_proj (E, 2F, H), or up_proj (E, F, H), and down_proj (E, H, F)
    hidden: torch.Tensor,  # (N, H)
    chosen: torch.Tensor,  # (N, K) indices of experts
    weights: torch.Tensor,  # (N, K)
) -> torch.Tensor:
    """The forward pass of the experts: for each token, the weighted sum of the outputs of its experts, (N, H).

    Args:
        experts: the module with the stacks of all experts.
        hidden: the hidden states of N tokens, (N, H).
        chosen: the indices of the K experts of each token, (N, K).
        weights: the router's weights of these experts, (N, K).
    """
    output = torch.zeros_like(hidden)
    into, out_of = _layers(experts, "gate_up_proj" if experts.has_gate else "up_proj"), _layers(experts, "down_proj")
    activation = experts._apply_gate if experts.has_gate else experts.act_fn
    flat = chosen.flatten()  # (N * K,)
    # by expert, then by token; a token chooses an expert once, so sums have one order
    order = flat.argsort(stable=True)
    # all numbers are looked at together: otherwise the CPU would wait for an accelerator at each expert
    counts = torch.bincount(flat, minlength=len(out_of)).tolist()
    tokens_of, places_of = (torch.split(it, counts) for it in (order // chosen.shape[1], order % chosen.shape[1]))
    for index, tokens, places in zip(range(len(out_of)), tokens_of, places_of, strict=False):
        if not counts[index]:
            continue  # indices beyond the experts are a mark of tokens that go through none
        inner = activation(F.linear(hidden[tokens], *into[index]))  # (n, F)
        made = F.linear(inner, *out_of[index])
        if getattr(experts, "has_post_expert_norm", False):
            made = experts.post_expert_norm(made)
        made = made * weights[tokens, places, None]  # (n, H)
        output.index_add_(0, tokens, made.to(output.dtype))
    return output


def _layers(experts: Any, name: str) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """For each expert, the weight (outputs, inputs) and the bias (None: no bias) of its linear layer `name`."""
    weights = getattr(experts, name)
    if experts.is_transposed:
        weights = weights.transpose(1, 2)
    biases = getattr(experts, f"{name}_bias").unbind(0) if experts.has_bias else [None] * len(weights)
    return list(zip(weights.unbind(0), biases, strict=True))


def expert_inner(experts: Any, index: int, hidden: torch.Tensor) -> torch.Tensor:
    """Compute the input of the last layer of an expert: hidden (n, H) -> (n, F).

    Args:
        experts: the module with the stacks of all experts.
        index: the index of the expert.
        hidden: the hidden states of the tokens that this expert processes.
    """
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    weight = getattr(experts, name)[index]
    bias = getattr(experts, f"{name}_bias")[index] if experts.has_bias else None
    into = F.linear(hidden, weight.T if experts.is_transposed else weight, bias)
    inner: torch.Tensor = experts._apply_gate(into) if experts.has_gate else experts.act_fn(into)
    return inner


def expert_matrices(family: "Architecture", experts: torch.nn.Module) -> list[dict[str, torch.Tensor]]:
    """For each expert, its matrices (outputs, inputs) as views of the stacks, by the linear layer's name in files."""
    row, parameters = family.experts, dict(experts.named_parameters())
    if row is None:
        return []
    found: list[dict[str, torch.Tensor]] = [{} for _ in range(len(next(iter(parameters.values()))))]
    for leaf, maps in row.stacks.items():
        for matrices, stacked in zip(found, parameters[leaf].detach(), strict=True):
            matrices |= zip(maps, stacked.chunk(len(maps)), strict=True)
    return found


def block_in_files(family: "Architecture", parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A block's parameters by path in files, from their paths in the module; experts are views of their stacks."""
    start = family.in_block(0, "")
    named = {f"{family.block_module(0)}.{name}": parameter for name, parameter in parameters.items()}
    return {name.removeprefix(start): tensor for name, tensor in in_files(family, named).items()}


def block_in_modules(family: "Architecture", tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A block's tensors by path in the module, from their paths in files; the matrices of experts are stacked.

    If matrices of a stack are missing or differ in shape, they are not stacked and keep their paths in files.
    """
    found, start = dict(tensors), family.in_block(0, "")
    if family.experts is not None:
        count = sum(path.startswith(f"{family.experts.path}.") for path in tensors) // len(family.experts.maps)
        for leaf in family.experts.stacks:
            name = f"{family.experts.module}.{leaf}"
            layers = [[path.removeprefix(start) for path in one] for one in family.stacked(start + name, count) or []]
            shapes = [[found[path].shape for path in expert if path in found] for expert in layers]
            if layers and all(len(one) == len(layers[0]) and one == shapes[0] for one in shapes):
                found[name] = torch.stack([torch.cat([found.pop(path) for path in expert]) for expert in layers])
    return {family.modules.get(path, path): tensor for path, tensor in found.items()}


def in_files(family: "Architecture", parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's parameters under their tensor names in files; stacked experts are split into views, without copies."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        stack = family.stacked(name, len(parameter) if parameter.dim() == 3 else 0)
        if stack is None:
            found[family.name_of(name) or name] = parameter
            continue
        for expert, names in zip(parameter.detach(), stack, strict=True):  # (outputs of its linear layers, inputs)
            found |= zip(names, expert.chunk(len(names)), strict=True)
    return found
