"""Prepares a model for training on a device: the device's backend replaces modules by faster ones and reports which."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from offsite.kernels.replacement_report import ABSENT, LORA, Backend, Piece, Report
from offsite.kernels.runtime import bf16_support

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prepare(model: "PreTrainedModel", device: torch.device, dtype: torch.dtype) -> Report:
    """Replace parts of a model by others that compute the same, faster or with less memory.

    Call it once, before adapters are attached to the model and before its blocks are wrapped in other modules.
    Parameters keep their names. On a CUDA device the prepared model accepts only sequences that are padded at the
    right.

    Args:
        model: the model, changed in place.
        device: the device that the model is on.
        dtype: the compute dtype.

    Returns:
        The backend, and for each kind of module how many were replaced, with the reason if some were not.
    """
    pieces: tuple[Piece, ...] = ()
    if device.type == "cpu":
        from offsite.kernels.cpu.prepare_for_cpu import prepare_for_cpu

        pieces = prepare_for_cpu(model, dtype)
    elif device.type == "cuda":
        from offsite.kernels.cuda.prepare_for_cuda import prepare_for_cuda

        pieces = prepare_for_cuda(model)
    else:
        pieces = (Piece("all modules", 0, f"there is no backend for {device.type}: as their library wrote them"),)
    return Report(backend_of(device), (_compute_dtype(device, dtype), *pieces))


def prepare_sharded(model: "PreTrainedModel", device: torch.device, dtype: torch.dtype) -> Report:
    """Replace parts of a model whose blocks will be shared among processes: only its attention, which has no weights.

    Args:
        model: the model, still on the CPU, changed in place.
        device: the device that it will run on.
        dtype: the compute dtype.

    Returns:
        The report, as of `prepare`.
    """
    pieces: tuple[Piece, ...] = (Piece("all other modules", 0, "blocks are shared among processes"),)
    if device.type == "cuda":
        from offsite.kernels.cuda.flash_attention import use_flash_attention

        pieces = (*pieces, use_flash_attention(model))
    return Report(backend_of(device), (_compute_dtype(device, dtype), *pieces))


def prepare_adapters(model: nn.Module, device: torch.device) -> tuple[Piece, ...]:
    """Replace adapter modules of a prepared model, such as LoRA layers, by faster ones; parameters keep their names.

    Args:
        model: the model, changed in place.
        device: the device that the model is on.

    Returns:
        Entries for `Report.with_pieces`: how many modules were replaced, with the reason if some were not.
    """
    if device.type != "cpu":
        has_lora = any(".lora_A." in name for name, _ in model.named_parameters())
        return (Piece(LORA, 0, "as PEFT runs them" if has_lora else ABSENT),)
    from offsite.kernels.cpu.prepare_for_cpu import prepare_adapters_for_cpu

    return prepare_adapters_for_cpu(model)


def backend_of(device: torch.device) -> Backend:
    """The backend that runs models on a device."""
    return "cpu" if device.type == "cpu" else "cuda" if device.type == "cuda" else "reference"


def _compute_dtype(device: torch.device, dtype: torch.dtype) -> Piece:
    """The entry for the report of the kernels: whether the compute dtype is bf16, and why."""
    fast, reason = bf16_support(device)
    is_bf16 = dtype == torch.bfloat16
    asked = "" if is_bf16 == fast else f"{'bf16' if is_bf16 else 'fp32'} was asked for; "
    return Piece("bf16 as compute dtype", int(is_bf16), asked + reason)
