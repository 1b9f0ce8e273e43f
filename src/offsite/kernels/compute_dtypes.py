"""Predicts which compute dtype a stage will use, before torch is imported. Torch-free."""

from typing import Literal

from offsite.kernels.cpu.cpu_features import multiplies_bf16

ITEM_BYTES = {"bf16": 2, "fp32": 4}  # bytes of one number


def possible_compute_dtypes(
    compute: Literal["auto", "bf16", "fp32"], device: str
) -> tuple[Literal["bf16", "fp32"], ...]:
    """The compute dtypes that `resolve_runtime` may choose: one dtype if the choice is certain, otherwise both.

    Args:
        compute: the setting `compute`; "auto" depends on the device.
        device: the setting `device`. Only torch can say which device "auto" means and whether a CUDA device multiplies
            bf16.
    """
    if compute != "auto":
        return (compute,)
    if device == "cpu":
        return ("bf16",) if multiplies_bf16() else ("fp32",)
    if device == "mps":
        return ("fp32",)
    return ("bf16",) if device.startswith("xpu") else ("bf16", "fp32")
