"""The settings of every stage: frozen, strict, and the same from flags, from TOML and from Python.

Defaults were chosen by measurement on SmolLM2-135M-Instruct; docs/decisions/ says how.
"""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from offsite.errors import UsageError

Method = Literal["lora", "full", "bitfit", "bottleneck"]
Dtype = Literal["bf16", "fp32"]
Healing = Literal["share", "refit", "distill", "affine"]
RefitMap = Literal["mlp", "attention"]
USUAL_PRUNE = 0.5  # of an emulator that drops no block


class Spec(BaseModel):
    """A frozen group of settings in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def changed(self, settings: Mapping[str, Any]) -> Self:
        """The same with these settings in the place of its own, checked like any."""
        return type(self).model_validate(self.model_dump(by_alias=True, exclude_unset=True) | dict(settings))


S = TypeVar("S", bound=Spec)


class ComputeSpec(Spec):
    """Where a stage that runs the network does so."""

    compute: Annotated[
        Literal["auto", "bf16", "fp32"], Field(description="dtype of the arithmetic; auto is bf16 where it is faster")
    ] = "auto"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?|xpu(:\d+)?)$", description="where it runs")] = (
        "auto"
    )
    threads: Annotated[
        int | None, Field(ge=1, description="processor threads; None takes $OMP_NUM_THREADS, else all")
    ] = None


class ImportSpec(Spec):
    """How a foreign checkpoint becomes a base folder."""

    dtype: Annotated[Dtype | None, Field(description="dtype to store; None keeps the checkpoint's (bf16 for GGUF)")] = (
        None
    )
    image_size: Annotated[
        int | None, Field(ge=1, le=4096, description="ONNX: side in pixels of the images that the model is given")
    ] = None


def _chain(given: object) -> object:
    """ "refit,distill" as a list of its words; "none" is an empty one."""
    words = [word.strip() for word in given.split(",")] if isinstance(given, str) else given
    return () if words in (["none"], []) else words


def _parts(given: object) -> object:
    """ "0,0.5,1" as a list of its parts."""
    return [part.strip() for part in given.split(",")] if isinstance(given, str) else given


def _numbers(given: object) -> object:
    """ "0,14,29" as a list of its whole numbers; what is none is left for the checks."""
    parts = _parts(given)
    if not isinstance(given, str) or not isinstance(parts, list):
        return given
    return [int(part) if part.isdecimal() else part for part in parts]


class PackSpec(ComputeSpec):
    """How a base model becomes a bundle."""

    bottom: Annotated[
        int | None, Field(ge=0, description="first blocks that the data owner trains; None: 2 in 15, at least 2")
    ] = None
    top: Annotated[
        int | None, Field(ge=0, description="last blocks that the data owner trains; None: 1 in 5, at least 2")
    ] = None
    train: Annotated[
        Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None,
        BeforeValidator(_numbers),
        Field(description="the blocks that train, such as 0,1,14,28,29, in place of bottom and top"),
    ] = None
    keep: Annotated[
        int | None,
        Field(ge=1, description="blocks of the middle that the emulator keeps; None: all, each pruned to half"),
    ] = None
    select: Annotated[
        Literal["uniform", "influence", "cluster", "contiguous", "search", "random"],
        Field(description="which blocks of the middle stay"),
    ] = "uniform"
    drop_from: Annotated[
        int | None, Field(ge=0, description="first block that 'contiguous' drops; None drops around the centre")
    ] = None
    search_minutes: Annotated[float, Field(gt=0, description="time that 'search' may take")] = 10.0
    heal: Annotated[
        tuple[Healing, ...],
        BeforeValidator(_chain),
        Field(description="how the emulator makes up for dropped blocks: none, or steps joined by commas"),
    ] = ("refit",)
    refit_maps: Annotated[
        tuple[RefitMap, ...],
        BeforeValidator(_parts),
        Field(
            min_length=1,
            max_length=8,
            description="output projections that refit solves in a kept block, in this order, also repeatedly",
        ),
    ] = ("mlp",)
    prune: Annotated[
        float | None,
        Field(
            ge=0,
            lt=1,
            description="share of each emulator matrix set to zero; None: 0.5 if nothing else compresses, else 0",
        ),
    ] = None
    prune_by: Annotated[
        Literal["magnitude", "sparsegpt"],
        Field(description="which numbers: the smallest; or those that cost least, and the others make up for them"),
    ] = "sparsegpt"
    zeros: Annotated[
        Literal["stored", "left-out"],
        Field(description="pruned numbers: an ordinary checkpoint has them; left out they save their bytes"),
    ] = "stored"
    bits: Annotated[
        Literal[8, 4] | None, Field(description="bits of a weight in the emulator's linear maps; None keeps floats")
    ] = None
    group: Annotated[Literal[64, 128], Field(description="weights that share a scale, with bits")] = 64
    svd_rank: Annotated[
        float | None, Field(gt=0, le=1, description="rank of the emulator's matrices as a share of the full; factors")
    ] = None
    mlp_width: Annotated[
        float | None, Field(gt=0, le=1, description="share of the feed-forward neurons that the emulator keeps")
    ] = None
    calibration: Annotated[
        Path | None, Field(description="text, rows or pictures to select and heal with; None takes what ships")
    ] = None
    calibration_tokens: Annotated[int, Field(ge=256, description="tokens of it to select and solve with")] = 65_536
    distill_tokens: Annotated[int, Field(ge=256, description="tokens of it to distill with")] = 262_144
    distill_epochs: Annotated[float, Field(gt=0, description="passes over them; distill_steps wins")] = 3.0
    distill_steps: Annotated[int | None, Field(ge=1, description="optimiser steps of the distillation")] = None
    distill_batch_tokens: Annotated[int, Field(ge=1, description="tokens of one step, at least one batch")] = 4096
    distill_lr: Annotated[float, Field(gt=0, description="peak learning rate of the distillation's AdamW")] = 5e-4
    distill_ce: Annotated[
        float, Field(ge=0, description="weight of the next token's cross-entropy; 0 leaves top and head out")
    ] = 0.0
    dtype: Annotated[Dtype, Field(description="dtype of the bundle's weights")] = "bf16"
    methods: Annotated[tuple[Method, ...], Field(min_length=1, description="tuning methods that the owner permits")] = (
        "lora",
        "full",
        "bitfit",
        "bottleneck",
    )
    max_rank: Annotated[int, Field(ge=1, description="largest LoRA rank that the owner takes back")] = 64
    max_width: Annotated[int, Field(ge=1, description="widest bottleneck that the owner takes back")] = 256
    permit_head: Annotated[
        bool, Field(description="take back the head too, for tune --tune-head; only where it is not the embedding")
    ] = False
    seed: Annotated[int, Field(ge=0, lt=2**63, description="seed of random selection, search and distillation")] = 0

    @model_validator(mode="after")
    def _something_trains(self) -> Self:
        if self.bottom == self.top == 0:
            raise ValueError("bottom and top are both 0: nothing would train")
        if self.train is not None and (self.bottom is not None or self.top is not None):
            raise ValueError("train lists the blocks that train, bottom and top count them: give one or the other")
        if self.train is not None and len(set(self.train)) < len(self.train):
            raise ValueError("train names a block twice")
        return self

    @model_validator(mode="after")
    def _steps_fit_together(self) -> Self:
        if len(set(self.heal)) != len(self.heal):
            raise ValueError(f"heal names a step twice: {','.join(self.heal)}")
        if "distill" in self.heal[:-1]:
            raise ValueError("distill must be heal's last step: a closed form after it would undo what it learnt")
        if "share" in self.heal and "refit" in self.heal:
            raise ValueError("share and refit are two ways to fill the same gap: choose one")
        if "share" in self.heal and self.pruned and self.prune_by == "sparsegpt":
            raise ValueError(
                "heal = share does not go with prune_by = sparsegpt, under which what is shared would come to differ: "
                "choose prune_by = magnitude"
            )
        if "affine" in self.heal:
            self._affine_fits()
        if self.bits is not None and self.svd_rank is not None:
            raise ValueError("bits and svd_rank both store a matrix in another way: choose one")
        if self.zeros == "left-out" and (self.pruned == 0 or self.bits is not None or self.svd_rank is not None):
            raise ValueError("zeros = left-out goes with prune above 0, and not with bits or svd_rank")
        if self.keep is None and (self.select != "uniform" or "share" in self.heal):
            what = "heal = share" if "share" in self.heal else f"select = {self.select}"
            raise ValueError(f"{what} is about blocks that are dropped: say with keep how many stay")
        if self.refit_maps != ("mlp",) and "refit" not in self.heal:
            raise ValueError("refit_maps is a setting of heal = refit and of no other")
        if self.drop_from is not None and self.select != "contiguous":
            raise ValueError("drop_from is a setting of select = contiguous and of no other")
        return self

    def _affine_fits(self) -> None:
        if len(self.heal) > 1:
            raise ValueError(
                "affine is heal's only step: refit and share fill the same gap, distill trains the blocks as if there "
                "were no maps behind them; choose heal = affine, or heal = refit,distill"
            )
        if self.pruned and self.prune_by == "sparsegpt":
            way = "say with keep how many blocks stay" if self.prune is None else "choose prune_by = magnitude"
            raise ValueError(f"heal = affine does not go with prune_by = sparsegpt, which has a pass of its own: {way}")

    def trained(self, blocks: int) -> frozenset[int]:
        """Which blocks of a base of so many train; the first 4 and last 6 of 30 by default (docs/decisions/0009)."""
        if self.train is not None:
            return frozenset(self.train)
        bottom = max(2, round(2 * blocks / 15)) if self.bottom is None else self.bottom
        top = max(2, round(blocks / 5)) if self.top is None else self.top
        return frozenset((*range(min(bottom, blocks)), *range(max(blocks - top, 0), blocks)))

    @property
    def declares(self) -> tuple[str, ...]:
        """Settings under which the bundle is no checkpoint of its family any more."""
        asked = {"bits": self.bits, "svd_rank": self.svd_rank, "mlp_width": self.mlp_width}
        named = [name for name in asked if asked[name] is not None]
        return (
            *(step for step in ("share", "affine") if step in self.heal),
            *named,
            *(["zeros"] if self.zeros == "left-out" else []),
        )

    @property
    def pruned(self) -> float:
        """The share of each emulator matrix that becomes zero."""
        if self.prune is not None:
            return self.prune
        otherwise = (self.keep, self.bits, self.svd_rank, self.mlp_width)
        return USUAL_PRUNE if all(setting is None for setting in otherwise) else 0.0

    def kept(self, middle: Sequence[int]) -> int:
        """How many blocks of a middle the emulator keeps."""
        return len(middle) if self.keep is None else self.keep

    @property
    def resumable(self) -> bool:
        """Whether packing keeps resume points: distillation and search take long."""
        return "distill" in self.heal or self.select == "search"


class TuneSpec(ComputeSpec):
    """How the data owner trains the adapter on the emulator."""

    method: Annotated[
        Method,
        Field(description="what trains: LoRA pairs, the blocks' weights (full) or biases (bitfit), or bottlenecks"),
    ] = "lora"
    rank: Annotated[int, Field(ge=1, description="rank of the LoRA pairs")] = 16
    lora_alpha: Annotated[
        float | None, Field(gt=0, lt=1e6, description="LoRA scale numerator; None is twice the rank")
    ] = None
    lora_dropout: Annotated[float, Field(ge=0, lt=1, description="dropout on the input of the LoRA pairs")] = 0.0
    width: Annotated[int, Field(ge=1, description="width of the bottlenecks")] = 64
    tune_head: Annotated[
        bool, Field(description="train the whole output head too, and send it back; if the owner permits it")
    ] = False
    lr: Annotated[
        float | None, Field(gt=0, description="peak learning rate of AdamW; None is 3e-4 for full, else 1e-3")
    ] = None
    schedule: Annotated[Literal["cosine", "linear", "constant"], Field(description="learning rate after warm-up")] = (
        "cosine"
    )
    warmup: Annotated[float, Field(ge=0, le=1, description="share of the steps that warm up")] = 0.05
    weight_decay: Annotated[float, Field(ge=0, description="AdamW's decoupled decay; never on norms or biases")] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0, description="gradients are clipped to this norm")] = 1.0
    epochs: Annotated[float, Field(gt=0, description="passes over the data; max_steps wins")] = 1.0
    max_steps: Annotated[int | None, Field(ge=1, description="optimiser steps")] = None
    batch_size: Annotated[int, Field(ge=1, description="rows per optimiser step")] = 16
    micro_batch_tokens: Annotated[
        int | None,
        Field(
            ge=1,
            description="padded tokens, or patches of pictures, that run at once, in all lanes together; None is 1024, "
            "and 512 of text in fp32, which are as many bytes",
        ),
    ] = None
    lanes: Annotated[
        int | None,
        Field(
            ge=1,
            le=64,
            description="text on a processor: micro-batches that run side by side, each with its share of the threads; "
            "None is 2 on matrix tiles (AMX), else 1; 1 where passes would disturb one another",
        ),
    ] = None
    memory: Annotated[
        str | None,
        Field(
            pattern=r"^\d+(\.\d+)?(MiB|GiB|MB|GB)$",
            description="bytes that the process may hold, such as 6GiB; measured on the rows before the first step",
        ),
    ] = None
    gradient_checkpointing: Annotated[
        bool, Field(description="run blocks again in the backward pass: less memory, about a quarter slower")
    ] = False
    cache_features: Annotated[
        Literal["auto", "off"],
        Field(description="whether frozen blocks before the first trained one run once and keep the result on disk"),
    ] = "auto"
    max_length: Annotated[int, Field(ge=8, description="longest row in tokens")] = 1024
    long_rows: Annotated[
        Literal["error", "truncate", "skip"], Field(description="what happens to rows over max_length")
    ] = "error"
    eval_every: Annotated[int | None, Field(ge=1, description="steps between validations; None only at the end")] = None
    checkpoints: Annotated[
        int, Field(ge=1, le=100, description="checkpoints in the return, evenly spaced, the last step's included")
    ] = 1
    report_scores: Annotated[
        bool, Field(description="tell the owner the loss of each checkpoint on the eval rows, in the signed return")
    ] = False
    save_every: Annotated[int, Field(ge=1, description="steps between resume points")] = 50
    seed: Annotated[int, Field(ge=0, lt=2**63, description="seed of order, dropout and LoRA initialisation")] = 0
    pooling: Annotated[
        Literal["class", "mean", "both"] | None,
        Field(description="images: what the classifier reads, class token or mean of patches; None is the family's"),
    ] = None
    head_start: Annotated[
        Literal["random", "probe"],
        Field(description="images: the classifier starts as next to nothing, or as a linear probe of the emulator"),
    ] = "probe"
    head_lr_factor: Annotated[
        float | None,
        Field(gt=0, description="images: learning rate of the classifier, times lr; None is 0.1 for a probe, else 10"),
    ] = None
    augment: Annotated[bool, Field(description="images: crop and mirror at random")] = True
    skip_bad: Annotated[bool, Field(description="images: leave out pictures that cannot be read")] = False
    eval_share: Annotated[float, Field(ge=0, lt=1, description="images: share held out for validation")] = 0.0
    workers: Annotated[
        int | None,
        Field(
            ge=0,
            le=64,
            description="images: processes that decode and crop; None is 0 on a processor: it does it itself",
        ),
    ] = None

    @property
    def head_factor(self) -> float:
        """What the classifier's learning rate is multiplied by: what was given, else what suits its start."""
        return self.head_lr_factor or (0.1 if self.head_start == "probe" else 10.0)

    @property
    def tokens_at_once(self) -> int:
        """`micro_batch_tokens`, where None is what fits any arithmetic but text's in fp32."""
        return self.micro_batch_tokens or 1024

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up: the one that was given, else the method's."""
        return self.lr if self.lr is not None else (3e-4 if self.method == "full" else 1e-3)


_STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)


class PlugInSpec(Spec):
    """How a return is put into the base model."""

    as_: Annotated[
        Literal["adapter", "merged"] | None,
        Field(alias="as", description="adapter folder or complete checkpoint; None: adapter where the method has one"),
    ] = None
    strength: Annotated[
        float | None,
        Field(
            ge=0, le=1.5, description="how far to go from the base's weights (0) to the returned ones (1); None is 1"
        ),
    ] = None
    strengths: Annotated[
        tuple[Annotated[float, Field(ge=0, le=1.5)], ...],
        BeforeValidator(_parts),
        Field(min_length=1, description="strengths to choose from, with --choose-on"),
    ] = _STRENGTHS
    checkpoint: Annotated[
        int | None, Field(ge=1, description="which checkpoint of the return, from 1; None is the last")
    ] = None
    again: Annotated[bool, Field(description="permit a return that was plugged in before")] = False

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> Self:
        if self.strength is not None and self.strengths != _STRENGTHS:
            raise ValueError("strength and strengths were both given: the one is fixed, the others are to choose from")
        if not any(self.strengths):
            raise ValueError("strengths holds nothing but 0, which is the base itself")
        return self


class EvalSpec(ComputeSpec):
    """How a model is scored."""

    max_length: Annotated[int, Field(ge=8, description="longest row in tokens")] = 1024
    long_rows: Annotated[
        Literal["error", "truncate", "skip"], Field(description="what happens to rows over max_length")
    ] = "error"
    micro_batch_tokens: Annotated[int, Field(ge=1, description="padded tokens that run at once")] = 8192
    max_rows: Annotated[int | None, Field(ge=1, description="score the first rows only")] = None
    skip_bad: Annotated[bool, Field(description="images: leave out pictures that cannot be read")] = False
    micro_batch_images: Annotated[int, Field(ge=1, description="images: pictures that run at once")] = 32
    workers: Annotated[
        int | None,
        Field(
            ge=0,
            le=64,
            description="images: processes that decode and crop; None is 0 on a processor: it does it itself",
        ),
    ] = None


# The tables that a TOML file may hold, one for each verb with settings.
TABLES: dict[str, type[Spec]] = {
    "import": ImportSpec,
    "pack": PackSpec,
    "tune": TuneSpec,
    "plug-in": PlugInSpec,
    "eval": EvalSpec,
}


def load_spec(kind: type[S], given: Mapping[str, Any], config: Path | None = None) -> S:
    """The settings of one stage: what was given, over what the TOML file says, over the defaults.

    Args:
        kind: the spec to build.
        given: settings by name; those that are None were not given.
        config: a TOML file with one table per stage ([pack], [tune], ...).

    Raises:
        UsageError: the file cannot be read, or a table, key or value is wrong; every problem is listed.
    """
    table = next(name for name, spec in TABLES.items() if spec is kind)
    settings = _read_toml(config).get(table, {}) if config is not None else {}
    settings = {**settings, **{name: value for name, value in given.items() if value is not None}}
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        where = f"the settings of '{table}'" + (f" in {config}" if config else "")
        raise UsageError(
            f"{where} are wrong",
            reasons=describe_validation(error),
            next_step=f"see `offsite {table} --help` for the settings and their ranges",
        ) from None


def _read_toml(config: Path) -> dict[str, dict[str, Any]]:
    try:
        tables: dict[str, Any] = tomllib.loads(config.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot read the settings file {config}", reasons=[str(error)]) from None
    unknown = sorted(name for name in tables if name not in TABLES or not isinstance(tables[name], dict))
    if unknown:
        raise UsageError(
            f"{config} holds what is no table of settings: {', '.join(unknown)}",
            next_step=f"the tables are {', '.join(f'[{name}]' for name in TABLES)}",
        )
    for name, table in tables.items():  # a typo in another stage's table must not pass in silence
        stray = sorted(set(table) - _keys(TABLES[name]))
        if stray:
            raise UsageError(
                f"{config} has unknown settings in [{name}]: {', '.join(stray)}",
                next_step=f"the settings of [{name}] are {', '.join(sorted(_keys(TABLES[name])))}",
            )
    return tables


def _keys(kind: type[Spec]) -> set[str]:
    return {field.alias or name for name, field in kind.model_fields.items()}


def describe_validation(error: ValidationError) -> list[str]:
    """Every problem of a validation, a line each: where, what is wrong, what was found."""
    lines = []
    for problem in error.errors(include_url=False):
        # keys may be a stranger's: no control characters to the terminal
        where = ".".join(p if p.isprintable() else ascii(p) for p in (str(part)[:80] for part in problem["loc"]))
        found = repr(problem["input"])
        lines.append(f"{where or 'settings'}: {problem['msg']} (found {found[:80]})")
    return lines
