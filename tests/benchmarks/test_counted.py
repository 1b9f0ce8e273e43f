"""The counted operations are those that torch counts while the networks run."""

import numpy as np
import pytest
import torch
from benchmarks.counted import Shape, ours, peer
from torch.utils.flop_counter import FlopCounterMode

from offsite.data.batches import collate
from offsite.data.examples import Example
from offsite.models.backbone import split_backbone_and_head
from offsite.models.loading import load_model
from offsite.training.label_losses import label_losses
from tiny import tiny_base

BLOCKS, LENGTH, LABELLED, ROWS = 4, 33, 10, 3


@pytest.fixture
def model(tmp_path):
    found = load_model(tiny_base(tmp_path / "base", blocks=BLOCKS), dtype=torch.float32, device=torch.device("cpu"))
    found.set_attn_implementation("eager")  # whose products the counter sees
    return found


def _shape(model, *, tokens, labelled, trained, below=0):
    block = model.model.layers[0]
    sizes = [module.weight.shape for module in block.modules() if isinstance(module, torch.nn.Linear)]
    return Shape(
        blocks=BLOCKS,
        kept=BLOCKS,
        trained=trained,
        below=below,
        block=sum(outputs * inputs for outputs, inputs in sizes),
        pairs=sum(outputs + inputs for outputs, inputs in sizes),
        attended=block.self_attn.o_proj.weight.shape[1],
        head=model.lm_head.weight.numel(),
        tokens=tokens,
        context=tokens,
        labelled=labelled,
    )


@pytest.mark.parametrize("below", [0, 2])
def test_full_tuning_of_the_bundle(model, below):
    for block in model.model.layers[below : below + 2]:
        block.requires_grad_(True)
    generator = np.random.default_rng(0)
    rows = [Example(i, generator.integers(0, 300, LENGTH + 1), LENGTH + 1 - LABELLED) for i in range(ROWS)]
    with FlopCounterMode(display=False) as counter:
        label_losses(split_backbone_and_head(model), collate(rows))[0].backward()
    with FlopCounterMode(display=False) as probe:
        split_backbone_and_head(model)
    shape = _shape(model, tokens=LENGTH, labelled=LABELLED / LENGTH, trained=2, below=below)
    counted = ours(shape, "full", 0) * ROWS * LENGTH
    found = counter.get_total_flops() - probe.get_total_flops()
    # the first trained block's inputs want no gradient, which the formula does not look into
    assert counted == pytest.approx(found, rel=0.08)


def test_full_fine_tuning_of_the_base(model):
    model.requires_grad_(True)
    ids = torch.randint(0, 300, (ROWS, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    counted = peer(_shape(model, tokens=LENGTH, labelled=1.0, trained=0), "full", 0) * ROWS * LENGTH
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.08)


def test_padding_is_paid_for(model):
    shape = _shape(model, tokens=LENGTH, labelled=1.0, trained=0)
    assert peer(shape, "lora", 16, pad_to=2 * LENGTH) > 2 * peer(shape, "lora", 16)
