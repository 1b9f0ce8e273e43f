"""Copies arrays to the device of a network, without making the CPU wait for the work that is queued there."""

from typing import Any

import numpy.typing as npt
import torch


def to_device(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """A tensor on a device with the values of an array; on the CPU it shares the array's memory.

    A copy to a CUDA device from ordinary memory would wait until all queued work is done. So the array is copied to
    page-locked memory first, and from there behind the queued work; torch keeps that memory until the copy has ended.
    """
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
