"""Replaces a module by one that computes the same faster or with less memory.

A module is not judged by its class: it is replaced only if on random numbers it computes what its replacement does.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from offsite.kernels.replacement_report import ABSENT, Piece

_PROBE = 7  # rows of random numbers that a module and its replacement must agree on


@dataclass(frozen=True)
class Candidate:
    """A module that might compute the same as another one."""

    piece: str  # its name in the report
    module: nn.Module


def replace_modules(
    model: nn.Module, candidates_of: Callable[[nn.Module], Iterable[Candidate]], pieces: Sequence[str]
) -> tuple[Piece, ...]:
    """Replace every module of a model that agrees with one of its candidates.

    Args:
        model: changed in place.
        candidates_of: what might compute the same as a module, by the names of its parts; empty for most modules.
        pieces: the names that candidates have, in the order of the report.

    Returns:
        For each name how many were replaced, and why no more were.
    """
    replaced: Counter[str] = Counter()
    differ: Counter[str] = Counter()
    last = ""
    for path, module in list(model.named_modules()):
        if last and path.startswith(f"{last}."):
            continue  # a part of what was replaced
        candidates = list(candidates_of(module))
        same = next((candidate for candidate in candidates if agree(module, candidate.module)), None)
        if same is not None:
            model.set_submodule(path, same.module.train(module.training))
            replaced[same.piece] += 1
            last = path
        elif candidates:
            differ[candidates[0].piece] += 1
    return tuple(Piece(name, replaced[name], _reason(replaced[name], differ[name])) for name in pieces)


@torch.no_grad()
def agree(module: nn.Module, other: nn.Module, width: int | None = None) -> bool:
    """Whether two modules give the same output for random inputs (7, width); None takes the width of the first's
    weight.
    """
    weight = next(module.parameters(), torch.ones(64, 64))
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(_PROBE, width or weight.shape[-1], generator=generator).to(weight.device, weight.dtype)
    try:
        expected, found = module(probe), other(probe)
    except (TypeError, ValueError, RuntimeError):  # it takes other arguments, so it is something else
        return False
    if not isinstance(expected, torch.Tensor) or expected.shape != found.shape:
        return False
    step = torch.finfo(weight.dtype).eps
    return bool(torch.allclose(expected, found, rtol=4 * step, atol=4 * step * float(expected.abs().max())))


@torch.no_grad()
def same_function(one: Callable[[torch.Tensor], torch.Tensor], other: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Whether two activation functions are the same; compared in fp32, as bf16 or small weights would hide a
    difference.
    """
    values = torch.linspace(-8, 8, 1025)
    try:
        return bool(torch.allclose(one(values), other(values), rtol=1e-5, atol=1e-6))
    except (TypeError, ValueError, RuntimeError):  # it takes other arguments, or weights of its own from elsewhere
        return False


def _reason(replaced: int, differ: int) -> str:
    if replaced and differ:
        return f"same results on random numbers; {differ} others of this form compute something else"
    if replaced:
        return "same results on random numbers"
    return f"all {differ} of this form compute something else" if differ else ABSENT
