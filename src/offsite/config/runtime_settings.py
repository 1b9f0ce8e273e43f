"""The settings of every stage that runs a network: dtype, device and threads."""

from typing import Annotated, Literal

from pydantic import Field

from offsite.config.spec import FILE_ONLY, Settings


class RuntimeSettings(Settings):
    """Compute dtype, device and number of CPU threads of a stage that runs a network."""

    compute: Annotated[
        Literal["auto", "bf16", "fp32"],
        Field(description="compute dtype; auto takes bf16 if it is faster on this machine"),
        FILE_ONLY,
    ] = "auto"
    device: Annotated[
        str,
        Field(
            pattern=r"^(auto|cpu|mps|cuda(:\d+)?|xpu(:\d+)?)$",
            examples=["auto", "cpu", "cuda", "cuda:1"],
            description="device that runs the model",
        ),
    ] = "auto"
    threads: Annotated[
        int | None, Field(ge=1, description="CPU threads; left out: $OMP_NUM_THREADS, else all"), FILE_ONLY
    ] = None
