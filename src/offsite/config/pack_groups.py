"""The groups of settings of `offsite pack`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from offsite.config.emulator_methods import HealingName, PrunerName, SelectionName, UnitRuleName
from offsite.config.setting_types import Chosen, Columns, Method, split_numbers, split_parts, split_steps
from offsite.config.spec import FILE_ONLY, Settings

RefitMap = Literal["mlp", "attention"]
Placement = Literal["sandwich", "top", "list", "every"]
NarrowWidths = Literal["even", "budget"]


class SplitSettings(Settings):
    """Which blocks the data owner trains, and which of them the bundle contains uncompressed."""

    placement: Annotated[
        Placement | None,
        Field(
            description="which blocks get trained weights: the first and last ones (sandwich), the last ones (top), "
            "those of train (list), or every block, all of them compressed; left out: sandwich, or list with train"
        ),
    ] = None
    bottom: Annotated[
        int | None,
        Field(
            ge=0,
            description="first blocks that are sent uncompressed and train; left out: 2 of 15, at least 2, fewer in a "
            "small base; 0 with placement top or every",
        ),
    ] = None
    top: Annotated[
        int | None,
        Field(
            ge=0,
            description="last blocks that are sent uncompressed and train; left out: 1 of 5, at least 2, fewer in a "
            "small base; 0 with placement every",
        ),
    ] = None
    train: Annotated[
        Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None,
        BeforeValidator(split_numbers),
        Field(
            description="blocks that are sent uncompressed and train, such as 0,1,14,28,29, instead of bottom and top"
        ),
    ] = None


class SelectSettings(Settings):
    """Which of the middle blocks the emulator keeps."""

    keep: Annotated[
        int | None,
        Field(
            ge=1,
            description="blocks of the middle that the emulator keeps; left out: all, each pruned to half, or 4 of 13 "
            "if select or heal needs dropped blocks",
        ),
    ] = None
    by: Annotated[
        SelectionName,
        Field(alias="select", description="how the kept blocks of the middle are chosen"),
    ] = "uniform"
    drop_from: Annotated[
        int | None, Field(ge=0, description="first block that 'contiguous' drops; left out: around the centre")
    ] = None
    search_minutes: Annotated[float, Field(gt=0, description="time that 'search' may take")] = 10.0


class HealSettings(Settings):
    """How the emulator compensates for dropped blocks."""

    steps: Annotated[
        tuple[HealingName, ...],
        BeforeValidator(split_steps),
        Field(
            alias="heal", description="how the emulator makes up for dropped blocks: none, or steps joined by commas"
        ),
    ] = ("refit",)
    refit_maps: Annotated[
        tuple[RefitMap, ...],
        BeforeValidator(split_parts),
        Field(
            min_length=1,
            max_length=8,
            description="output projections that refit solves in a kept block, in this order, also repeatedly",
        ),
        FILE_ONLY,
    ] = ("mlp",)


class DistillSettings(Settings):
    """Healing by distillation: its data, number of steps, learning rate and loss."""

    tokens: Annotated[int, Field(alias="distill_tokens", ge=256, description="calibration tokens to distill with")] = (
        262_144
    )
    epochs: Annotated[
        float, Field(alias="distill_epochs", gt=0, description="passes over these tokens; distill_steps overrides it")
    ] = 3.0
    steps: Annotated[
        int | None, Field(alias="distill_steps", ge=1, description="optimiser steps of the distillation")
    ] = None
    minutes: Annotated[
        float | None,
        Field(
            alias="heal_minutes",
            gt=0,
            description="about how long the distillation may take, instead of a number of passes or steps; without "
            "heal, heal is refit,distill",
        ),
    ] = None
    batch_tokens: Annotated[
        int, Field(alias="distill_batch_tokens", ge=1, description="tokens of one step, at least one batch"), FILE_ONLY
    ] = 4096
    lr: Annotated[
        float, Field(alias="distill_lr", gt=0, description="peak learning rate of the distillation's AdamW")
    ] = 5e-4
    ce: Annotated[
        float,
        Field(
            alias="distill_ce",
            ge=0,
            description="weight of the next-token cross-entropy in the loss; at 0 top and head do not run",
        ),
    ] = 0.0


class CompressSettings(Settings):
    """How the emulator's weights are pruned, quantised or factorised."""

    prune: Annotated[
        float | None,
        Field(
            ge=0,
            lt=1,
            description="share of each emulator matrix set to zero; left out: 0.5 without other compression or with "
            "zeros = left-out, else 0",
        ),
    ] = None
    prune_by: Annotated[
        PrunerName,
        Field(
            description="which weights become zero: the smallest, or chosen with calibration data; left out: "
            "sparsegpt, or magnitude where heal needs it"
        ),
    ] = "sparsegpt"
    zeros: Annotated[
        Literal["stored", "left-out"],
        Field(
            description="zero weights: stored as in an ordinary checkpoint, or left out, which makes the bundle smaller"
        ),
    ] = "stored"
    bits: Annotated[
        Literal[8, 4] | None, Field(description="bits of each weight in the emulator's linear layers; left out: floats")
    ] = None
    group: Annotated[Literal[64, 128], Field(description="with bits: number of weights that share a scale")] = 64
    svd_rank: Annotated[
        float | None,
        Field(gt=0, le=1, description="store the emulator's matrices as two factors, with this share of the full rank"),
    ] = None
    mlp_width: Annotated[
        float | None, Field(gt=0, le=1, description="share of the feed-forward neurons that the emulator keeps")
    ] = None


class NarrowSettings(Settings):
    """How many heads, MLP neurons and experts remain in the emulator's blocks; fewer experts save only memory."""

    share: Annotated[
        float | None,
        Field(
            alias="narrow",
            gt=0,
            le=1,
            description="share of the multiply-adds of a block's linear layers that remains: attention heads and MLP "
            "neurons are removed; of a mixture of experts, heads alone",
        ),
    ] = None
    heads: Annotated[
        float | None,
        Field(
            alias="narrow_heads",
            gt=0,
            le=1,
            description="share of the key-value heads that remain, with the heads that read them; instead of narrow",
        ),
    ] = None
    neurons: Annotated[
        float | None,
        Field(
            alias="narrow_neurons", gt=0, le=1, description="share of the MLP neurons that remain; instead of narrow"
        ),
    ] = None
    experts: Annotated[
        float | None,
        Field(
            alias="narrow_experts",
            gt=0,
            le=1,
            description="share of the experts of a mixture that remain, which saves size and memory, not computation: "
            "a token goes through as many as before; instead of narrow",
        ),
    ] = None
    widths: Annotated[
        NarrowWidths,
        Field(
            alias="narrow_widths",
            description="with narrow: every block keeps the same share (even), or the blocks that matter less on "
            "calibration data lose more (budget)",
        ),
    ] = "even"
    by: Annotated[
        UnitRuleName, Field(alias="narrow_by", description="how the heads, neurons and experts that remain are chosen")
    ] = "obs"


class CalibrationSettings(Settings):
    """The calibration data, with which blocks are selected, pruned and healed."""

    source: Annotated[
        Path | None,
        Field(
            alias="calibration",
            description="text, rows or pictures to select and heal with; left out: the data in the package",
        ),
    ] = None
    columns: Columns = None
    chosen: Chosen = False
    tokens: Annotated[
        int,
        Field(alias="calibration_tokens", ge=256, description="calibration tokens to select and solve with"),
        FILE_ONLY,
    ] = 65_536


class PermitSettings(Settings):
    """Which returns the owner accepts."""

    methods: Annotated[
        tuple[Method, ...], Field(min_length=1, description="tuning methods that the owner permits"), FILE_ONLY
    ] = (
        "lora",
        "full",
        "bitfit",
        "bottleneck",
    )
    max_rank: Annotated[int, Field(ge=1, description="largest LoRA rank that the owner accepts"), FILE_ONLY] = 64
    max_width: Annotated[int, Field(ge=1, description="largest bottleneck width that the owner accepts"), FILE_ONLY] = (
        256
    )
    permit_head: Annotated[
        bool, Field(description="accept a trained head too (tune --tune-head); not if head and embedding are tied")
    ] = False
