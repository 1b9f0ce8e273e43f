"""Counts the operations per token that tuning needs, from the sizes of the base's tensors and the lengths of rows."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.cells import PEERS, RANK, SHAPES, Cell
from benchmarks.counted import Shape, ours, peer


def shape_of(cell: Cell, base: Path, plan: Mapping[str, Any]) -> Shape:
    """Collect the sizes that `benchmarks.counted` needs.

    Args:
        cell: the shape of the model, with the split of its bundle.
        base: the base folder; only its config and the headers of its weights are read.
        plan: numbers of rows, tokens and labels in the measured steps, as `benchmarks.steps` prints them.
    """
    from offsite.models.families.architectures import architecture_of
    from offsite.storage.checkpoint_folder import open_checkpoint

    config = json.loads((base / "config.json").read_text())
    family, tensors = architecture_of(config), open_checkpoint(base).tensors
    sizes = {
        path: next(t.shape for n, t in tensors.items() if n.endswith(f".0.{path}.weight")) for path in family.linears
    }
    vocabulary, hidden = tensors[next(n for n in tensors if n.endswith((".embed_tokens.weight", ".wte.weight")))].shape
    bottom, keep, top = SHAPES[cell.shape]
    return Shape(
        blocks=family.block_count(config),
        kept=bottom + keep + top,
        trained=bottom + top,
        below=0 if bottom else keep,
        block=sum(first * second for first, second in sizes.values()),
        pairs=sum(first + second for first, second in sizes.values()),
        attended=sizes[family.attention_out][0 if family.transposed else 1],
        head=vocabulary * hidden,
        tokens=plan["tokens"] / plan["rows"],
        context=plan["squares"] / plan["tokens"],
        labelled=plan["labels"] / plan["tokens"],
    )


def operations(shape: Shape, contestant: str, pad_to: int | None) -> float:
    """Floating-point operations per token (without padding) that one contestant needs.

    Args:
        shape: from `shape_of`.
        contestant: one of `benchmarks.cells.CONTESTANTS`, such as "offsite lora".
        pad_to: the width in tokens to which a peer pads all rows; None: padding is not counted.
    """
    if contestant in PEERS:
        return peer(shape, contestant.split(",")[0], RANK, pad_to)
    return ours(shape, contestant.split()[1], RANK)
