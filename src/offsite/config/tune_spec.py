"""The settings of `offsite tune`, and the rules about combinations of these settings."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from offsite.config.runtime_settings import RuntimeSettings
from offsite.config.setting_types import Chosen, Columns, LongRows, Method, Workers
from offsite.config.spec import FILE_ONLY, Settings, Spec, rule


class AdapterSettings(Settings):
    """Which parameters train."""

    method: Annotated[
        Method,
        Field(description="what trains: LoRA matrices, the blocks' weights (full) or biases (bitfit), or bottlenecks"),
    ] = "lora"
    rank: Annotated[int, Field(ge=1, description="rank of the LoRA matrices")] = 16
    lora_alpha: Annotated[
        float | None, Field(gt=0, lt=1e6, description="LoRA scale numerator; left out: twice the rank"), FILE_ONLY
    ] = None
    lora_dropout: Annotated[
        float, Field(ge=0, lt=1, description="dropout on the input of the LoRA matrices"), FILE_ONLY
    ] = 0.0
    width: Annotated[int, Field(ge=1, description="width of the bottlenecks")] = 64
    tune_head: Annotated[
        bool, Field(description="also train the output head and return it; the owner must permit it")
    ] = False


class OptimizerSettings(Settings):
    """AdamW and its learning rate."""

    lr: Annotated[
        float | None, Field(gt=0, description="peak learning rate of AdamW; left out: 3e-4 for full, else 1e-3")
    ] = None
    schedule: Annotated[
        Literal["cosine", "linear", "constant"], Field(description="learning rate after warm-up"), FILE_ONLY
    ] = "cosine"
    warmup: Annotated[float, Field(ge=0, le=1, description="share of the steps that warm up"), FILE_ONLY] = 0.05
    weight_decay: Annotated[
        float, Field(ge=0, description="AdamW's decoupled decay; never on norms or biases"), FILE_ONLY
    ] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0, description="gradients are clipped to this norm"), FILE_ONLY] = 1.0


class LengthSettings(Settings):
    """How long a tuning run is."""

    epochs: Annotated[float, Field(gt=0, description="passes over the data; max_steps overrides it")] = 1.0
    max_steps: Annotated[int | None, Field(ge=1, description="optimiser steps")] = None
    batch_size: Annotated[int, Field(ge=1, description="rows per optimiser step")] = 16


class RowSettings(Settings):
    """How rows of text become tokens."""

    max_length: Annotated[int, Field(ge=8, description="longest row in tokens")] = 1024
    long_rows: LongRows = "error"
    columns: Columns = None
    chosen: Chosen = False


class MemorySettings(Settings):
    """How much runs at the same time, and what is stored or computed again."""

    budget: Annotated[
        str | None,
        Field(
            alias="memory",
            examples=["6GiB", "512MB"],
            pattern=r"^\d+(\.\d+)?(MiB|GiB|MB|GB)$",
            description="memory limit of the process, such as 6GiB; checked with trial steps on your rows",
        ),
    ] = None
    micro_batch_tokens: Annotated[
        int | None,
        Field(
            ge=1,
            description="padded tokens, or patches of pictures, that run at once, over all micro-batches side by side; "
            "left out: 1024, but 512 for text in fp32; on CUDA 1024 for each 16 GiB of its memory",
        ),
        FILE_ONLY,
    ] = None
    lanes: Annotated[
        int | None,
        Field(
            ge=1,
            le=64,
            description="text on a CPU: number of micro-batches side by side, each with its share of the threads; "
            "left out: 2 on CPUs with AMX, else 1",
        ),
        FILE_ONLY,
    ] = None
    gradient_checkpointing: Annotated[
        bool, Field(description="recompute blocks in the backward pass: less memory, about a quarter slower")
    ] = False
    shard: Annotated[
        Literal["none", "blocks"],
        Field(
            description="several processes: blocks keeps a share of each frozen block in every process, for a model "
            "that does not fit on one device; slower"
        ),
    ] = "none"
    cache_features: Annotated[
        Literal["auto", "off"],
        Field(description="run the frozen blocks before the first trained one once, and store their output on disk"),
        FILE_ONLY,
    ] = "auto"


class PointSettings(Settings):
    """When a tuning run is validated, and when its state is saved."""

    eval_every: Annotated[
        int | None, Field(ge=1, description="steps between validations; left out: only at the end"), FILE_ONLY
    ] = None
    checkpoints: Annotated[
        int, Field(ge=1, le=100, description="checkpoints in the return, evenly spaced, the last step included")
    ] = 1
    report_scores: Annotated[
        bool,
        Field(description="put the loss of each checkpoint on the eval rows into the return, where the owner sees it"),
    ] = False
    save_every: Annotated[int, Field(ge=1, description="steps between resume points"), FILE_ONLY] = 50


class ImageSettings(Settings):
    """Settings of image models."""

    pooling: Annotated[
        Literal["class", "mean", "both"] | None,
        Field(
            description="images: the classifier's input, class token or mean of patches; left out: the family's default"
        ),
        FILE_ONLY,
    ] = None
    head_start: Annotated[
        Literal["random", "probe"],
        Field(description="images: start of the classifier, small random weights or a linear probe of the emulator"),
        FILE_ONLY,
    ] = "probe"
    head_lr_factor: Annotated[
        float | None,
        Field(
            gt=0, description="images: factor on lr for the classifier; left out: 0.1 for head_start = probe, else 10"
        ),
        FILE_ONLY,
    ] = None
    augment: Annotated[bool, Field(description="images: crop and mirror at random"), FILE_ONLY] = True
    skip_bad: Annotated[bool, Field(description="images: leave out pictures that cannot be read")] = False
    eval_share: Annotated[float, Field(ge=0, lt=1, description="images: share held out for validation"), FILE_ONLY] = (
        0.0
    )
    workers: Workers = None


class TuneSpec(Spec):
    """The settings of `offsite tune`."""

    if TYPE_CHECKING:  # every setting is a keyword argument, by its key

        def __init__(self, **settings: Any) -> None: ...

    alternatives = ((("epochs",), ("max_steps",)),)

    adapter: AdapterSettings = AdapterSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    length: LengthSettings = LengthSettings()
    rows: RowSettings = RowSettings()
    memory: MemorySettings = MemorySettings()
    points: PointSettings = PointSettings()
    images: ImageSettings = ImageSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    seed: Annotated[int, Field(ge=0, lt=2**63, description="seed of order, dropout and LoRA initialisation")] = 0

    @rule
    def _head_excludes_bottlenecks(self) -> None:
        """`tune_head` needs `method` lora, full or bitfit: a plug-in of bottlenecks contains no tensors of the base."""
        if self.adapter.tune_head and self.adapter.method == "bottleneck":
            raise ValueError(
                "tune_head cannot be used with bottlenecks, whose plug-in holds no tensors of the base; "
                "choose method lora, full or bitfit, or leave tune_head out"
            )

    @rule
    def _shards_excludes_memory(self) -> None:
        """`memory` needs `shard` none: with shared blocks no process can try alone what fits into its memory."""
        if self.memory.shard != "none" and self.memory.budget is not None:
            raise ValueError(
                "memory cannot be used with shard, where no process can measure alone; "
                "lower micro_batch_tokens or use gradient_checkpointing in its place"
            )

    def not_for_images(self) -> list[str]:
        """Settings in use that exclude image models: `report_scores`, and more than one of `checkpoints`."""
        in_use = {"checkpoints": self.points.checkpoints > 1, "report_scores": self.points.report_scores}
        return [key for key, used in in_use.items() if used]

    @property
    def head_factor(self) -> float:
        """The factor on the classifier's learning rate: `head_lr_factor`, or its default for `head_start`."""
        return self.images.head_lr_factor or (0.1 if self.images.head_start == "probe" else 10.0)

    @property
    def tokens_at_once(self) -> int:
        """The number of padded tokens that run at once: `micro_batch_tokens`, or 1024 if it is not set.

        The default depends on the device (`offsite.kernels.runtime.usual_tokens_at_once`); the caller sets
        `micro_batch_tokens` to it before.
        """
        return self.memory.micro_batch_tokens or 1024

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up: `lr`, or the method's default."""
        return self.optimizer.lr if self.optimizer.lr is not None else (3e-4 if self.adapter.method == "full" else 1e-3)
