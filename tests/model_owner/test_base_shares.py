"""How much of the base goes out: each parameter is counted once, by what the bundle has in its place."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from artifacts import packed
from offsite.model_owner.base_shares import BaseShares
from offsite.model_owner.ledger import Ledger
from offsite.storage.checkpoint_folder import open_checkpoint
from tiny import MakeBase, Parties

Tensors = dict[str, torch.Tensor]
BLOCKS, HIDDEN, INNER = 5, 32, 48
MLP, ATTENTION, NORMS = 3 * HIDDEN * INNER, HIDDEN * (32 + 16 + 16 + 32), 2 * HIDDEN
BLOCK = MLP + ATTENTION + NORMS
ENDS = {"bottom": 1, "top": 1}
EVERY = {"bottom": None, "top": None, "placement": "every"}
# The layer whose kept outputs are the kept inputs of an output projection, by family.
BEFORE = {
    "llama": {"mlp.down_proj": "mlp.gate_proj", "self_attn.o_proj": "self_attn.q_proj"},
    "gpt2": {"mlp.c_proj": "mlp.c_fc", "attn.c_proj": "attn.c_attn"},
}
PREFIX = {"llama": "model.layers", "gpt2": "transformer.h"}


def shares_of(base: Path, out: Path, parties: Parties, **settings: Any) -> tuple[BaseShares, tuple[int, ...]]:
    """The recorded shares of a new bundle, and the base indices of its blocks."""
    bundle = packed(base, out, parties, calibration_tokens=512, **settings)
    issued = Ledger(parties.owner.ledger).issued(bundle.digest)
    assert issued is not None
    assert issued.shares is not None
    return issued.shares, issued.kept


@pytest.mark.parametrize(
    ("settings", "compressed", "not_sent"),
    [
        ({**ENDS, "keep": 3, "heal": "none"}, 0, 0),
        ({**ENDS, "keep": 1, "heal": "none"}, 0, 2 * BLOCK),
        ({**ENDS, "keep": 1, "heal": "share"}, 0, 2 * BLOCK),
        ({**ENDS, "keep": None, "prune": 0.5, "prune_by": "magnitude"}, 3 * (MLP + ATTENTION) // 2, 0),
        ({**ENDS, "keep": None, "bits": 8}, 3 * (MLP + ATTENTION), 0),
        ({**EVERY, "keep": None, "bits": 4}, 5 * (MLP + ATTENTION), 0),
        ({**EVERY, "keep": None, "mlp_width": 0.5}, 0, 5 * MLP // 2),
        ({**EVERY, "keep": 2, "svd_rank": 0.5}, 2 * (MLP + ATTENTION), 3 * BLOCK),
        ({**EVERY, "bottom": 1, "keep": None, "bits": 8}, 4 * (MLP + ATTENTION), 0),
    ],
)
def test_shares(
    base_of: MakeBase, tmp_path: Path, parties: Parties, settings: dict[str, Any], compressed: int, not_sent: int
) -> None:
    base = base_of("llama", BLOCKS)
    total = sum(math.prod(tensor.shape) for tensor in open_checkpoint(base).tensors.values())
    shares, _ = shares_of(base, tmp_path / "bundle", parties, **settings)
    assert shares == BaseShares(total - compressed - not_sent, compressed, not_sent)
    assert sum(shares.fractions.values()) == pytest.approx(1)
    assert shares.fractions["not_sent"] == pytest.approx(not_sent / total)


WAYS: dict[str, dict[str, Any]] = {
    "whole blocks": {**ENDS, "keep": 3, "heal": "none"},
    "dropped, refit": {**ENDS, "keep": 1, "heal": "refit"},
    "dropped, refit, bf16": {**ENDS, "keep": 1, "heal": "refit", "dtype": "bf16"},
    "dropped, affine": {**ENDS, "keep": 1, "heal": "affine"},
    "shared": {**EVERY, "keep": 2, "heal": "share"},
    "pruned by magnitude": {**ENDS, "keep": None, "prune": 0.5, "prune_by": "magnitude"},
    "pruned by magnitude, zeros left out": {
        **ENDS, "keep": None, "prune": 0.5, "prune_by": "magnitude", "zeros": "left-out",
    },
    "pruned by Wanda": {**ENDS, "keep": None, "prune": 0.5, "prune_by": "wanda", "zeros": "left-out", "dtype": "bf16"},
    "pruned by SparseGPT, refit": {**ENDS, "keep": None, "prune": 0.5, "heal": "refit", "dtype": "bf16"},
    "quantised": {**ENDS, "keep": None, "bits": 8},
    "narrower MLPs": {**EVERY, "keep": None, "mlp_width": 0.5},
    "narrower MLPs, pruned": {
        **EVERY, "keep": None, "mlp_width": 0.5, "prune": 0.5, "prune_by": "magnitude", "zeros": "left-out",
    },
    "narrowed": {**ENDS, "keep": None, "narrow": 0.5},
    "narrowed, refit, bf16": {**EVERY, "keep": None, "narrow": 0.6, "heal": "refit", "dtype": "bf16"},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", BEFORE)
def test_shares_are_those_of_a_comparison_of_every_value(
    base_of: MakeBase, tmp_path: Path, parties: Parties, family: str, way: str
) -> None:
    base = base_of(family, BLOCKS)
    shares, kept = shares_of(base, tmp_path / "bundle", parties, **WAYS[way])
    whole, sent = (_loaded(folder) for folder in (base, tmp_path / "bundle"))
    total = sum(tensor.numel() for tensor in whole.values())
    equal, present = _compare(whole, sent, kept, family)
    assert shares == BaseShares(equal, present - equal, total - present)
    assert 0 < equal <= total
    assert (equal == total) == (way == "whole blocks")


def _loaded(folder: Path) -> Tensors:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def _compare(whole: Tensors, sent: Tensors, kept: tuple[int, ...], family: str) -> tuple[int, int]:
    """Compare a bundle with the base: how many values are equal, and how many have a place in the bundle."""
    prefix = PREFIX[family]
    outside = [name for name in whole if not name.startswith(prefix)]
    equal = present = sum(whole[name].numel() for name in outside)
    assert all(bool((whole[name].to(sent[name].dtype) == sent[name]).all()) for name in outside)
    for index, base_index in enumerate(kept):
        ours = _block(sent, f"{prefix}.{index}.")
        theirs = _block(whole, f"{prefix}.{base_index}.")
        for path, values in theirs.items() if ours else ():  # a block that shares weights has none
            found = _stored(ours, path, transposed=family == "gpt2")
            if isinstance(found, int):
                present += found
                continue
            part = values.to(found.dtype)
            for axis in range(values.dim()):
                if found.shape[axis] < values.shape[axis]:
                    part = part.index_select(axis, _kept(ours, theirs, path, family))
            equal += int((part == found).sum())
            present += found.numel()
    return equal, present


def _block(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _stored(block: Tensors, path: str, *, transposed: bool) -> torch.Tensor | int:
    """A tensor of a bundle's block; of one that is stored in few bits the number of its values."""
    layer = path.removesuffix(".weight")
    if path in block:
        return block[path]
    if f"{layer}.quantised" in block:  # 8 bits
        return block[f"{layer}.quantised"].numel()
    mask, values = block[f"{layer}.mask"], block[f"{layer}.values"]
    bits = [[bool(byte >> place & 1) for byte in row for place in range(8)] for row in mask.tolist()]
    places = torch.tensor(bits)
    matrix = torch.zeros(places.shape, dtype=values.dtype)
    matrix[places] = values  # in row order; widths of the tiny models are multiples of 8
    return matrix.T if transposed else matrix


def _kept(ours: Tensors, theirs: Tensors, path: str, family: str) -> torch.Tensor:
    """The base's indices that a narrower tensor has, found by the equal rows of the layer whose units were removed.

    Zeros of a pruned layer count as equal.
    """
    layer, transposed = path.rpartition(".")[0], family == "gpt2"
    source = BEFORE[family].get(layer, layer)
    small = _stored(ours, f"{source}.weight", transposed=transposed)
    assert isinstance(small, torch.Tensor)
    large = theirs[f"{source}.weight"].to(small.dtype)
    if transposed:
        small, large = small.T, large.T
    alike = ((small[:, None] == large[None]) | (small[:, None] == 0)).all(-1)  # (kept rows, rows)
    assert bool((alike.sum(1) == 1).all())
    at = alike.int().argmax(1)
    return at[at < HIDDEN] if source != layer and source == "attn.c_attn" else at  # of queries, keys and values
