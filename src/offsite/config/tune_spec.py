"""How the data owner trains the adapter on the emulator."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from offsite.config.choices import LongRows, Method, Workers
from offsite.config.runtime import RuntimeSettings
from offsite.config.spec import FILE_ONLY, Settings, Spec, rule


class AdapterSettings(Settings):
    """What trains."""

    method: Annotated[
        Method,
        Field(description="what trains: LoRA pairs, the blocks' weights (full) or biases (bitfit), or bottlenecks"),
    ] = "lora"
    rank: Annotated[int, Field(ge=1, description="rank of the LoRA pairs")] = 16
    lora_alpha: Annotated[
        float | None, Field(gt=0, lt=1e6, description="LoRA scale numerator; left out: twice the rank"), FILE_ONLY
    ] = None
    lora_dropout: Annotated[
        float, Field(ge=0, lt=1, description="dropout on the input of the LoRA pairs"), FILE_ONLY
    ] = 0.0
    width: Annotated[int, Field(ge=1, description="width of the bottlenecks")] = 64
    tune_head: Annotated[
        bool, Field(description="train the whole output head too, and send it back; if the owner permits it")
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
    """How long a run is."""

    epochs: Annotated[float, Field(gt=0, description="passes over the data; max_steps wins")] = 1.0
    max_steps: Annotated[int | None, Field(ge=1, description="optimiser steps")] = None
    batch_size: Annotated[int, Field(ge=1, description="rows per optimiser step")] = 16


class RowSettings(Settings):
    """How rows of text become tokens."""

    max_length: Annotated[int, Field(ge=8, description="longest row in tokens"), FILE_ONLY] = 1024
    long_rows: LongRows = "error"


class MemorySettings(Settings):
    """What runs at once, and what is kept or computed again."""

    budget: Annotated[
        str | None,
        Field(
            alias="memory",
            examples=["6GiB", "512MB"],
            pattern=r"^\d+(\.\d+)?(MiB|GiB|MB|GB)$",
            description="bytes that the process may hold, such as 6GiB; measured on the rows before the first step",
        ),
    ] = None
    micro_batch_tokens: Annotated[
        int | None,
        Field(
            ge=1,
            description="padded tokens, or patches of pictures, that run at once, in all lanes together; left out: "
            "1024, and 512 of text in fp32, which are as many bytes",
        ),
        FILE_ONLY,
    ] = None
    lanes: Annotated[
        int | None,
        Field(
            ge=1,
            le=64,
            description="text on a CPU: micro-batches that run side by side, each with its share of the threads; "
            "left out: 2 on matrix tiles (AMX), else 1; 1 where passes would disturb one another",
        ),
        FILE_ONLY,
    ] = None
    gradient_checkpointing: Annotated[
        bool, Field(description="run blocks again in the backward pass: less memory, about a quarter slower")
    ] = False
    cache_features: Annotated[
        Literal["auto", "off"],
        Field(description="whether frozen blocks before the first trained one run once and keep the result on disk"),
        FILE_ONLY,
    ] = "auto"


class PointSettings(Settings):
    """When a run is validated, and what is kept of it."""

    eval_every: Annotated[
        int | None, Field(ge=1, description="steps between validations; left out: only at the end"), FILE_ONLY
    ] = None
    checkpoints: Annotated[
        int, Field(ge=1, le=100, description="checkpoints in the return, evenly spaced, the last step's included")
    ] = 1
    report_scores: Annotated[
        bool, Field(description="tell the owner the loss of each checkpoint on the eval rows, in the signed return")
    ] = False
    save_every: Annotated[int, Field(ge=1, description="steps between resume points"), FILE_ONLY] = 50


class ImageSettings(Settings):
    """What image models alone have."""

    pooling: Annotated[
        Literal["class", "mean", "both"] | None,
        Field(description="images: what the classifier reads, class token or mean of patches; left out: the family's"),
        FILE_ONLY,
    ] = None
    head_start: Annotated[
        Literal["random", "probe"],
        Field(description="images: the classifier starts as next to nothing, or as a linear probe of the emulator"),
        FILE_ONLY,
    ] = "probe"
    head_lr_factor: Annotated[
        float | None,
        Field(
            gt=0, description="images: learning rate of the classifier, times lr; left out: 0.1 for a probe, else 10"
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
    seed: Annotated[
        int, Field(ge=0, lt=2**63, description="seed of order, dropout and LoRA initialisation"), FILE_ONLY
    ] = 0

    @rule
    def _head_beside_no_bottlenecks(self) -> None:
        """`tune_head` goes with `method` lora, full or bitfit: bottlenecks are plugged in beside the base's tensors."""
        if self.adapter.tune_head and self.adapter.method == "bottleneck":
            raise ValueError(
                "tune_head does not go with bottlenecks: their plug-in stands beside the base and holds none of its "
                "tensors; tune by lora, full or bitfit, or leave tune_head out"
            )

    def not_for_images(self) -> list[str]:
        """Image models go with one of `checkpoints` and no `report_scores`: each would need its classifier."""
        asked = {"checkpoints": self.points.checkpoints > 1, "report_scores": self.points.report_scores}
        return [key for key, wrong in asked.items() if wrong]

    @property
    def head_factor(self) -> float:
        """What the classifier's learning rate is multiplied by: what was given, else what suits its start."""
        return self.images.head_lr_factor or (0.1 if self.images.head_start == "probe" else 10.0)

    @property
    def tokens_at_once(self) -> int:
        """`micro_batch_tokens`, where None is what fits any arithmetic but text's in fp32."""
        return self.memory.micro_batch_tokens or 1024

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up: the one that was given, else the method's."""
        return self.optimizer.lr if self.optimizer.lr is not None else (3e-4 if self.adapter.method == "full" else 1e-3)
