"""Quantisation of weights to 8 or 4 bits: symmetric, rounded to nearest. Torch-free.

Each output's weights are divided into groups along the inputs, and each group has a scale.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from offsite.config import PackSpec
from offsite.model_owner.base_model import BaseModel
from offsite.models.modules.declared import Declared

Array = npt.NDArray[np.float32]


def declare(model: BaseModel, spec: PackSpec) -> Mapping[str, Any]:
    """The number of bits per weight, and the number of weights that share a scale, in the fields of `Declared`."""
    return {"bits": spec.compress.bits, "group": spec.compress.group}


def encode(weight: Array, declared: Declared) -> Mapping[str, npt.NDArray[Any]]:
    """The tensors that store a quantised matrix (outputs, inputs): its integer codes "quantised", and "scales"."""
    codes, scales = quantise(weight, declared.bits or 8, declared.group or 64)
    return {"quantised": codes, "scales": scales}


def quantise(weight: Array, bits: int, group: int) -> tuple[npt.NDArray[np.uint8] | npt.NDArray[np.int8], Array]:
    """Quantise a matrix (outputs, inputs) to integer codes and scales.

    Args:
        weight: the matrix.
        bits: 8 or 4.
        group: number of consecutive weights of an output that share a scale.

    Returns:
        Codes: int8 (outputs, inputs); for 4 bits uint8 (outputs, inputs / 2 rounded up), each code plus 8, with the
        code of an even input in the low four bits. Scales: float32 (outputs, groups); the last group may be shorter
        than the others.
    """
    outputs, inputs = weight.shape
    groups = -(-inputs // group)
    padded = np.zeros((outputs, groups * group), np.float32)
    padded[:, :inputs] = weight
    grouped = padded.reshape(outputs, groups, group)
    most = 2 ** (bits - 1) - 1
    scales = np.abs(grouped).max(-1) / most  # (outputs, groups)
    steps = np.where(scales > 0, scales, 1)[..., None]
    codes = np.clip(np.rint(grouped / steps), -most, most).astype(np.int8).reshape(outputs, -1)[:, :inputs]
    return (codes if bits == 8 else _pack_pairs(codes)), scales


def _pack_pairs(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Pack two 4-bit codes into each byte; an odd number of inputs is padded with a zero code."""
    shifted = (codes + 8).astype(np.uint8)
    if shifted.shape[1] % 2:
        shifted = np.pad(shifted, ((0, 0), (0, 1)), constant_values=8)
    packed: npt.NDArray[np.uint8] = shifted[:, ::2] | (shifted[:, 1::2] << np.uint8(4))
    return packed
