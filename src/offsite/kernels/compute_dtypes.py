"""Predicts a stage's compute dtype before torch is imported. Torch-free."""

from typing import Literal

from offsite.kernels.cpu.cpu_features import multiplies_bf16

ITEM_BYTES = {"bf16": 2, "fp32": 4}


def possible_compute_dtypes(
    compute: Literal["auto", "bf16", "fp32"], device: str
) -> tuple[Literal["bf16", "fp32"], ...]:
    """The dtypes that `runtime` may choose: one where that is known, else both.

    Args:
        compute: the setting; "auto" depends on the device.
        device: the setting; which one "auto" takes, and what a CUDA device can do, torch alone knows.
    """
    if compute != "auto":
        return (compute,)
    if device == "cpu":
        return ("bf16",) if multiplies_bf16() else ("fp32",)
    if device == "mps":
        return ("fp32",)
    return ("bf16",) if device.startswith("xpu") else ("bf16", "fp32")
