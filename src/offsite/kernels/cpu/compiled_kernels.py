"""Python functions for the kernels in `_kernels.c`: attention, activations, norms and softmax on bf16 tensors.

The build of the package compiles that file if it can. `attends` and `activates` are False if it could not, if the CPU
lacks the instructions, or if the environment sets OFFSITE_KERNELS=0. Then the other functions here must not be called,
and the callers use torch instead.
"""

import ctypes
import importlib.machinery
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from offsite.kernels.cpu.cpu_features import has_tiles

VERSION = 1  # version of the functions' arguments; must be equal in the library
_SIDE = 32  # sequence lengths are padded to multiples of this number
VECTORS, TILES = 1, 2  # instruction levels that the library reports
LEAST_WORK = 2**17  # least numbers (or attention probabilities) per thread; with fewer another thread costs more time


class _Tensor(ctypes.Structure):
    """The C struct `tensor` of the compiled library: a pointer, and strides."""

    _fields_ = [("first", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("row", "head", "token"))]


class _Attention(ctypes.Structure):
    """The C struct `attention` of the compiled library: the tensors and settings of one call."""

    _fields_ = [
        *(
            (name, _Tensor)
            for name in ("query", "key", "value", "output", "grad_output", "of_query", "of_key", "of_value")
        ),
        ("logarithms", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("heads", "groups", "length", "width")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_uint32) for name in ("causal", "dropped")),
        ("seed", ctypes.c_uint64),
    ]


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled library; None if the build did not make it."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernels{suffix}")
        if path.exists():
            return ctypes.CDLL(str(path))
    return None


@cache
def level() -> tuple[int, str]:
    """The instruction level that the kernels can use here (0, `VECTORS` or `TILES`), and the reason.

    This function asks the operating system for permission to use the matrix tiles, so it must run before any kernel.
    """
    if os.environ.get("OFFSITE_KERNELS") == "0":
        return 0, "switched off by OFFSITE_KERNELS=0"
    library = _library()
    if library is None:
        return 0, "they were not compiled when the package was installed"
    found = int(library.offsite_kernels(VERSION))
    if found == 0:
        return 0, "this CPU has no vectors for bf16 (AVX-512), or they are of another version of the package"
    if found == TILES and has_tiles():
        return TILES, "attention on matrix tiles (AMX), activations, norms and softmax on vectors"
    return VECTORS, "activations, norms and softmax on vectors; there are no matrix tiles for attention"


def attends(*tensors: torch.Tensor) -> bool:
    """Whether the compiled attention can run for these tensors (B, heads, T, D)."""
    return level()[0] >= TILES and all(_fits(tensor) and tensor.stride(-1) == 1 for tensor in tensors)


def activates(*tensors: torch.Tensor) -> bool:
    """Whether the compiled activations, norms and softmax can run for these tensors."""
    return level()[0] >= VECTORS and all(_fits(tensor) and tensor.is_contiguous() for tensor in tensors)


def _fits(tensor: torch.Tensor) -> bool:
    """Whether a tensor is bf16 and on the CPU."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu"


@dataclass(frozen=True)
class AttentionSettings:
    """Settings of an attention besides its query, key and value.

    Attributes:
        scale: the factor of the scores.
        causal: whether a query sees no later keys.
        dropped: how many of 65,536 attention probabilities dropout sets to zero; the others are scaled up to
            compensate.
        seed: the seed of dropout, at most 62 bits.
    """

    scale: float
    causal: bool
    dropped: int = 0
    seed: int = 0


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, settings: AttentionSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention, and the logarithms from which `attend_back` computes the probabilities again.

    Args:
        query: (B, heads, T, D).
        key: (B, key-value heads, T, D); each key-value head serves the same number of query heads.
        value: same shape as `key`.
        settings: scale, causal rule and dropout.

    Returns:
        The output (B, T, heads, D); and for each query the base-2 logarithm of its softmax's denominator, in fp32,
        (B, heads, T padded to a multiple of 32).

    Raises:
        MemoryError: not enough memory for the buffers of a few heads.
    """
    batch, heads, length, width = query.shape
    output = query.new_empty(batch, length, heads, width)
    logarithms = query.new_empty(batch, heads, -(-length // _SIDE) * _SIDE, dtype=torch.float32)
    _attention("offsite_attend", (query, key, value, output.transpose(1, 2)), logarithms, settings)
    return output, logarithms


def attend_back(
    grad_output: torch.Tensor,
    attended: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    output: torch.Tensor,
    logarithms: torch.Tensor,
    settings: AttentionSettings,
) -> list[torch.Tensor]:
    """Compute the gradients of query, key and value.

    Args:
        grad_output: the gradient of the output, (B, T, heads, D).
        attended: query, key and value, as given to `attend`.
        output: the output of `attend`.
        logarithms: the logarithms of `attend`.
        settings: the settings given to `attend`.

    Returns:
        The gradients of query, key and value, in the shapes of these; in memory, the heads of a token are contiguous.

    Raises:
        MemoryError: not enough memory for the buffers of a few heads.
    """
    grad_output = grad_output if grad_output.stride(-1) == 1 else grad_output.contiguous()
    gradients = [part.new_empty(part.transpose(1, 2).shape).transpose(1, 2) for part in attended]
    tensors = (*attended, output.transpose(1, 2), grad_output.transpose(1, 2), *gradients)
    _attention("offsite_attend_back", tensors, logarithms, settings)
    return gradients


def gelu(given: torch.Tensor) -> torch.Tensor:
    """Compute GELU in its tanh form, for a tensor of any shape."""
    return _each("offsite_gelu", given)


def gelu_back(grad_output: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """The gradient of the tanh GELU's input, from the gradient of its output."""
    return _each("offsite_gelu_back", grad_output.contiguous(), given)


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Compute silu(gate) * up for tensors of any shape."""
    return _each("offsite_gated", gate, up)


def gated_back(grad_output: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradients of `gate` and `up` from the gradient of the output of `gated`."""
    of_up = torch.empty_like(up)
    return _each("offsite_gated_back", of_up, grad_output.contiguous(), gate, up), of_up


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute x / rms(x) * weight for hidden states (..., H); x / rms(x) is rounded to bf16 before the product.

    `epsilon` is added to the mean square of x.

    Returns:
        The normed states (..., H), and the scales 1 / rms(x) (...) in fp32, which `rms_norm_back` needs.
    """
    normed, width = torch.empty_like(hidden), hidden.shape[-1]
    scales = hidden.new_empty(hidden.shape[:-1], dtype=torch.float32)
    pointers = [_at(normed), _at(scales), _at(hidden), _at(weight)]
    _run("offsite_normed", [*pointers, ctypes.c_int64(width), ctypes.c_float(epsilon)], scales.numel(), each=width)
    return normed, scales


def rms_norm_back(
    grad_output: torch.Tensor, scales: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Compute the gradient of the hidden states of `rms_norm` from the gradient of its output."""
    grad_output, gradient, width = grad_output.contiguous(), torch.empty_like(hidden), hidden.shape[-1]
    pointers = [_at(part) for part in (gradient, grad_output, scales, hidden, weight)]
    _run("offsite_normed_back", [*pointers, ctypes.c_int64(width)], scales.numel(), each=width)
    return gradient


def softmax_(logits: torch.Tensor, labels: torch.Tensor, nats: torch.Tensor, *, slopes: bool) -> None:
    """Write each label's loss in nats to `nats`; with `slopes`, also replace the logits by the gradient of the losses.

    Args:
        logits: (L, V), bf16.
        labels: (L,), int64.
        nats: the output, (L,), fp32.
        slopes: whether the logits are replaced by their gradient.

    Raises:
        IndexError: a label is not between 0 and V - 1.
    """
    width = logits.shape[1]
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < width:
        raise IndexError(f"label {int(labels.max())} of a vocabulary of {width}")
    pointers = [_at(part) for part in (logits, nats, labels)]
    _run("offsite_softmax", [*pointers, ctypes.c_int64(width), ctypes.c_int(slopes)], len(labels), each=width)


def _each(name: str, *given: torch.Tensor) -> torch.Tensor:
    """Call the elementwise function `name` of the compiled library; the result has the shape of the last tensor."""
    result = torch.empty_like(given[-1])
    _run(name, [_at(result), *map(_at, given)], result.numel(), each=1)
    return result


def _attention(
    name: str, tensors: Sequence[torch.Tensor], logarithms: torch.Tensor, settings: AttentionSettings
) -> None:
    """Call the function `name` of the compiled library, whose argument is an `_Attention`.

    Its first fields are the structs of `tensors`, each (B, heads, T, D).
    """
    (batch, heads, length, width), groups = tensors[0].shape, tensors[1].shape[1]
    arguments = _Attention(
        *map(_tensor, tensors),
        logarithms=logarithms.data_ptr(),
        heads=heads,
        groups=groups,
        length=length,
        width=width,
        **asdict(settings),
    )
    _run(name, [ctypes.byref(arguments)], batch * groups, each=heads // groups * length**2)


def _tensor(given: torch.Tensor) -> _Tensor:
    """The C struct for a tensor (B, heads, T, D)."""
    row, head, token, _ = given.stride()
    return _Tensor(given.data_ptr(), row, head, token)


def _at(given: torch.Tensor) -> ctypes.c_void_p:
    """The address of a tensor's data, for the compiled library."""
    return ctypes.c_void_p(given.data_ptr())


def _run(name: str, given: list[Any], count: int, each: int) -> None:
    """Call a function of the compiled library on `count` items of `each` numbers, split over torch's number of threads.

    The calls release Python's global interpreter lock. `given` are the function's arguments before the range of items.

    Raises:
        MemoryError: a function of attention could not allocate its buffers.
    """
    function = getattr(_library(), name)
    threads = max(1, min(torch.get_num_threads(), count, count * each // LEAST_WORK))
    cuts = [ctypes.c_int64(count * part // threads) for part in range(threads + 1)]
    others = [_pool(threads).submit(function, *given, *cuts[part : part + 2]) for part in range(1, threads)]
    failed = [function(*given, *cuts[:2]), *(other.result() for other in others)]
    if "attend" in name and any(failed):
        raise MemoryError("no memory is left for attention: give fewer tokens at once (micro_batch_tokens)")


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """A pool of `threads` - 1 threads: the thread that calls the compiled library does the remaining part itself."""
    return ThreadPoolExecutor(threads - 1, "kernels")
