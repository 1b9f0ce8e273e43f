"""Below the lowest trained block nothing is kept for a backward pass, wherever trained weights sit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.config import Method, PackSpec, TuneSpec
from offsite.data.batches import collate
from offsite.data.pictures.picture_workers import PictureWorkers
from offsite.data_owner.prepare_model import prepare_model
from offsite.data_owner.train import Tuning
from offsite.data_owner.tuning_data import TextData, read_data
from offsite.kernels.activation_checkpointing import checkpoint_activations
from offsite.kernels.runtime import resolve_runtime
from offsite.model_owner.pack import pack
from offsite.progress import silent
from offsite.protocol.artifacts import Base
from offsite.training.label_losses import label_losses
from tiny import MakeBase, Parties, tiny_rows

# placement -> settings, blocks of the bundle, the lowest trained one
PLACEMENTS: dict[str, tuple[dict[str, Any], int, int]] = {
    "sandwich without bottom": ({"bottom": 0, "top": 2}, 5, 3),
    "top": ({"placement": "top", "top": 1}, 5, 4),
    "list": ({"placement": "list", "train": (2, 4)}, 5, 2),
    "every": ({"placement": "every"}, 5, 0),
    "every, first blocks are copies": (
        {"placement": "every", "keep": 1, "heal": "share", "prune": 0.0, "select": "contiguous", "drop_from": 0}, 5, 4,
    ),
}  # fmt: skip


def tuning_of(base: Path, tmp_path: Path, parties: Parties, method: Method, **settings: Any) -> Tuning:
    packing = PackSpec.model_validate({"dtype": "fp32", "prune_by": "magnitude", "heal": "none", **settings})
    bundle = pack(Base(base), tmp_path / "bundle", "hospital", packing, parties.owner)
    spec = TuneSpec.model_validate({"method": method, "compute": "fp32", "device": "cpu", "threads": 1})
    read = read_data(bundle, tiny_rows(tmp_path / "rows.jsonl", 4), None, spec, silent, PictureWorkers())
    assert isinstance(read, TextData)
    return prepare_model(bundle, read, spec, resolve_runtime("cpu", "fp32", 1), silent)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("method", ["lora", "bottleneck", "bitfit"])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_no_graph_below_the_lowest_trained_block(
    base_of: MakeBase, tmp_path: Path, parties: Parties, placement: str, method: Method, *, again: bool
) -> None:
    settings, blocks, lowest = PLACEMENTS[placement]
    tuning = tuning_of(base_of("gpt2", 5), tmp_path, parties, method, **settings)
    if again:
        checkpoint_activations(tuning.blocks)
    entered: list[bool] = []
    for block in tuning.blocks.children():
        block.register_forward_pre_hook(lambda _, arguments: entered.append(arguments[0].requires_grad))
    total, _ = label_losses(tuning.task.network, collate(tuning.task.examples))  # type: ignore[union-attr]
    assert entered == [False] * (lowest + 1) + [True] * (blocks - lowest - 1)
    total.backward()
    gradients = [parameter.grad for parameter in tuning.weights.working.values()]
    assert all(gradient is not None for gradient in gradients)
    assert any(bool(torch.count_nonzero(gradient)) for gradient in gradients if gradient is not None)
