"""Weights in 8 or 4 bits: symmetric, a scale for each group of an output's inputs, rounded to nearest. Torch-free."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from offsite.config import PackSpec
from offsite.model_owner.base_model import BaseModel
from offsite.models.modules.declared import Declared

Array = npt.NDArray[np.float32]


def declare(model: BaseModel, spec: PackSpec) -> Mapping[str, Any]:
    """The bits of a weight, and how many weights share a scale."""
    return {"bits": spec.compress.bits, "group": spec.compress.group}


def encode(weight: Array, declared: Declared) -> Mapping[str, npt.NDArray[Any]]:
    """A matrix (outputs, inputs) as `quantised`, its codes, and `scales`."""
    codes, scales = quantise(weight, declared.bits or 8, declared.group or 64)
    return {"quantised": codes, "scales": scales}


def quantise(weight: Array, bits: int, group: int) -> tuple[npt.NDArray[np.uint8] | npt.NDArray[np.int8], Array]:
    """A matrix (outputs, inputs) as codes and scales.

    Returns:
        Codes: int8 (outputs, inputs); for 4 bits uint8 (outputs, inputs / 2), the even input in the low half, with 8
        added. Scales: float32 (outputs, groups); the last group may be shorter than the others.
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
    """Two codes a byte; the last of an odd number is padded with a zero."""
    shifted = (codes + 8).astype(np.uint8)
    if shifted.shape[1] % 2:
        shifted = np.pad(shifted, ((0, 0), (0, 1)), constant_values=8)
    packed: npt.NDArray[np.uint8] = shifted[:, ::2] | (shifted[:, 1::2] << np.uint8(4))
    return packed
