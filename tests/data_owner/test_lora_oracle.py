"""PEFT's own way, `get_peft_model`, as the oracle for our pairs: start, forward, a step of AdamW, merged weights."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from offsite.config import TuneSpec
from offsite.data_owner.methods.lora import attach
from offsite.models.families.architectures import ARCHITECTURES
from offsite.models.loading import load_model
from tiny import tiny_base, tiny_bundle, tiny_parties

CPU = torch.device("cpu")
# peft 0.21 asks transformers 5.23 by the old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_our_pairs_are_pefts(tmp_path, family):
    bundle = tiny_bundle(tiny_base(tmp_path / "b", family, 4), tmp_path / "bundle", tiny_parties(tmp_path), keep=1)
    manifest, ids = bundle.manifest, torch.arange(3, 19)[None]
    ours = load_model(bundle.folder, dtype=torch.float32, device=CPU)
    torch.manual_seed(7)
    pairs = attach(ours, manifest, TuneSpec(rank=3, lora_alpha=9.0))

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=3,
        lora_alpha=9.0,
        target_modules=sorted(manifest.lora_targets),
        fan_in_fan_out=ARCHITECTURES[family].transposed,
    )
    torch.manual_seed(7)
    theirs = get_peft_model(load_model(bundle.folder, dtype=torch.float32, device=CPU), config)
    oracle = {
        name.replace(".default.weight", ".weight"): parameter
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }

    def same() -> None:
        assert pairs.keys() == oracle.keys()
        assert all(torch.equal(pairs[name], oracle[name]) for name in pairs)

    same()
    assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    for model, parameters in ((ours, pairs), (theirs, oracle)):
        optimizer = torch.optim.AdamW(list(parameters.values()), lr=0.05, weight_decay=0.1)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    same()
    assert all(bool(pair.any()) for pair in pairs.values())  # B has left zero
    assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    merged = dict(theirs.merge_and_unload().named_parameters())
    own = dict(load_model(bundle.folder, dtype=torch.float32, device=CPU).named_parameters())
    for target in manifest.lora_targets:  # W + alpha / rank * B A
        a, b = (pairs[f"base_model.model.{target}.lora_{half}.weight"] for half in "AB")
        delta = 3.0 * (b @ a)
        expected = own[f"{target}.weight"] + (delta.T if ARCHITECTURES[family].transposed else delta)
        torch.testing.assert_close(merged[f"{target}.weight"], expected, rtol=1e-5, atol=1e-6)
