"""The agreement of an emulator's gradients with its base's: 1 for the base itself, else what autograd says."""

from pathlib import Path
from typing import Any

import pytest
import torch

from artifacts import packed
from offsite.data.batches import collate
from offsite.data.examples import Example
from offsite.data.read_rows import read_rows
from offsite.data.tokens import encode
from offsite.model_owner.base_model import open_base
from offsite.model_owner.gradient_agreement import Agreement, gradient_agreement, module_path, weight_gradients
from offsite.model_owner.ledger import Ledger
from offsite.models.backbone import split_backbone_and_head
from offsite.models.loading import load_model
from offsite.models.tokenizers import load_tokenizer
from offsite.protocol.artifacts import Base
from offsite.training.label_losses import label_losses
from tiny import MakeBase, Parties, tiny_rows

CPU = torch.device("cpu")


def examples_of(base: Path, rows: Path) -> list[Example]:
    found = read_rows(rows)
    return list(encode(found, load_tokenizer(base), source=rows, max_length=64, long_rows="truncate").examples)


def agreement(base: Path, tmp_path: Path, parties: Parties, **settings: Any) -> Agreement:
    bundle = packed(base, tmp_path / "bundle", parties, **settings)
    issued = Ledger(parties.owner.ledger).issued(bundle.digest)
    assert issued is not None
    assert issued.carry is not None
    examples = examples_of(base, tiny_rows(tmp_path / "rows.jsonl"))
    return gradient_agreement(open_base(Base(base)), bundle, issued.carry, examples, CPU)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_of_layers_are_those_of_autograd(base_of: MakeBase, tmp_path: Path, family: str) -> None:
    base = base_of(family)
    model, opened = load_model(base, dtype=torch.float32, device=CPU), open_base(Base(base))
    layers = [module_path(opened.family, block, path) for block in (0, 2) for path in opened.family.linears]
    examples = examples_of(base, tiny_rows(tmp_path / "rows.jsonl", 3))
    loss, found = weight_gradients(model, layers, examples)
    for name in layers:
        model.get_submodule(name).weight.requires_grad_()
    total, of_labels = label_losses(split_backbone_and_head(model), collate(examples))
    total.backward()  # type: ignore[no-untyped-call]
    assert loss == pytest.approx(float(of_labels.mean()), rel=1e-5)
    for name in layers:
        wanted = model.get_submodule(name).weight.grad
        torch.testing.assert_close(found[name], wanted.T if opened.family.transposed else wanted, rtol=1e-4, atol=1e-5)


def test_the_base_agrees_with_itself(base_of: MakeBase, tmp_path: Path, parties: Parties) -> None:
    found = agreement(base_of(blocks=4), tmp_path, parties)
    assert found.cosine == pytest.approx(1)
    assert all(cosine == pytest.approx(1) for cosine in found.of_layers.values())
    assert found.losses[0] == pytest.approx(found.losses[1])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_narrower_and_rougher_blocks_agree_less(
    base_of: MakeBase, tmp_path: Path, parties: Parties, family: str
) -> None:
    base, common = base_of(family, 4), {"placement": "every", "bottom": None, "top": None, "keep": None}
    found = [
        agreement(base, tmp_path / str(at), parties, **common, **settings).cosine
        for at, settings in enumerate(({"bits": 8}, {"bits": 4}, {"narrow": 0.5}))
    ]
    assert 1 > found[0] > found[1]
    assert found[0] > found[2]
    assert found[0] > 0.95
