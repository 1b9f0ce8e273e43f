"""Replaces modules by others that compute the same, faster or with less memory.

A module is replaced only if it and its replacement give the same output for random inputs; its class does not matter.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from offsite.kernels.replacement_report import ABSENT, Piece

_PROBE = 7  # random input vectors on which a module and its replacement must give the same output


@dataclass(frozen=True)
class Candidate:
    """A possible replacement of a module; `replace_modules` uses it only if its output is the same as the module's."""

    piece: str  # name of the kind of module in the report
    module: nn.Module


def replace_modules(
    model: nn.Module, candidates_of: Callable[[nn.Module], Iterable[Candidate]], pieces: Sequence[str]
) -> tuple[Piece, ...]:
    """Replace every module of a model that gives the same output as one of its candidates.

    Args:
        model: the model, changed in place.
        candidates_of: takes a module and returns its possible replacements; for most modules there are none.
        pieces: the kinds of modules (the values of `Candidate.piece`), in the order of the report.

    Returns:
        One entry for each of `pieces`: how many modules were replaced, and why others were not.
    """
    replaced: Counter[str] = Counter()
    differ: Counter[str] = Counter()
    last = ""
    for path, module in list(model.named_modules()):
        if last and path.startswith(f"{last}."):
            continue  # it is inside a module that was replaced
        candidates = [one for one in candidates_of(module) if _takes_as_much(one.module, module)]
        same = next((candidate for candidate in candidates if agree(module, candidate.module)), None)
        if same is not None:
            _keep_settings(same.module, module)
            model.set_submodule(path, same.module.train(module.training))
            replaced[same.piece] += 1
            last = path
        elif candidates:
            differ[candidates[0].piece] += 1
    return tuple(Piece(name, replaced[name], _reason(replaced[name], differ[name])) for name in pieces)


def _takes_as_much(candidate: nn.Module, module: nn.Module) -> bool:
    """Whether the candidate's `forward` has at least as many parameters as the module's.

    Norms of state-space models, for example, have a second input, the gate.
    """
    inputs = [len(inspect.signature(one.forward).parameters) for one in (candidate, module)]
    return inputs[0] >= inputs[1]


def _keep_settings(new: nn.Module, old: nn.Module) -> None:
    """Copy attributes that are booleans, numbers or strings from a module to its replacement, if it lacks them.

    The code around the module may read them.
    """
    for name, value in vars(old).items():
        if not name.startswith("_") and isinstance(value, bool | int | float | str) and not hasattr(new, name):
            setattr(new, name, value)


@torch.no_grad()
def agree(module: nn.Module, other: nn.Module, width: int | None = None) -> bool:
    """Whether two modules give the same output for random inputs of shape (7, width).

    By default the width is the last dimension of the first module's weight.
    """
    weight = next(module.parameters(), torch.ones(64, 64))
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(_PROBE, width or weight.shape[-1], generator=generator).to(weight.device, weight.dtype)
    try:
        expected, found = module(probe), other(probe)
    except (TypeError, ValueError, RuntimeError):  # it takes other arguments, so it computes something else
        return False
    if not isinstance(expected, torch.Tensor) or expected.shape != found.shape:
        return False
    step = torch.finfo(weight.dtype).eps
    return bool(torch.allclose(expected, found, rtol=4 * step, atol=4 * step * float(expected.abs().max())))


@torch.no_grad()
def same_function(one: Callable[[torch.Tensor], torch.Tensor], other: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Whether two activation functions give the same output for 1,025 numbers from -8 to 8.

    They are compared in fp32, since rounding to bf16 could hide a small difference.
    """
    values = torch.linspace(-8, 8, 1025)
    try:
        return bool(torch.allclose(one(values), other(values), rtol=1e-5, atol=1e-6))
    except (TypeError, ValueError, RuntimeError):  # it takes other arguments, or has weights on another device
        return False


def _reason(replaced: int, differ: int) -> str:
    """The reason for the report of the kernels.

    Args:
        replaced: the number of modules that were replaced.
        differ: the number of modules that compute something else than their candidates.
    """
    if replaced and differ:
        return f"same results on random numbers; {differ} others of this form compute something else"
    if replaced:
        return "same results on random numbers"
    return f"all {differ} of this form compute something else" if differ else ABSENT
