import numpy as np
import pytest
import torch

from offsite.core import attention
from offsite.core.attention import use_short_attention
from offsite.core.data import Example, collate
from offsite.core.load import load_model
from offsite.core.loss import label_losses, take_apart
from tiny import KINDS, tiny_base

CPU = torch.device("cpu")


def losses_and_gradient(model, examples):
    weight = model.get_input_embeddings().weight.requires_grad_(True)
    weight.grad = None
    total, nats = label_losses(take_apart(model), collate(examples))
    total.backward()
    return nats, weight.grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [(12, 12), (5, 30, 17)], ids=["causal", "padded"])
def test_it_computes_what_the_fused_one_does(tmp_path, kind, lengths, monkeypatch):
    model = load_model(tiny_base(tmp_path / "b", blocks=2, **KINDS[kind]), dtype=torch.bfloat16, device=CPU)
    generator = np.random.default_rng(0)
    examples = [Example(i, generator.integers(0, 300, length), 1) for i, length in enumerate(lengths)]
    fused = losses_and_gradient(model, examples)
    through_interface = model._supports_attention_backend and model.config._attn_implementation == "sdpa"
    assert through_interface or KINDS[kind]["family"] in ("gemma2", "stablelm", "gptj", "bloom", "falcon")
    use_short_attention(model)
    calls = []
    additive = attention._additive
    monkeypatch.setattr(attention, "_additive", lambda *inputs: calls.append(1) or additive(*inputs))
    short = losses_and_gradient(model, examples)
    assert len(calls) == (2 if through_interface else 0)  # once a block: it did run
    assert (fused[0] - short[0]).abs().max() < 0.15
    cosine = torch.nn.functional.cosine_similarity(fused[1].float().flatten(), short[1].float().flatten(), dim=0)
    assert cosine > 0.995


def test_without_a_gradient_the_fused_one_runs(tmp_path, monkeypatch):
    model = load_model(tiny_base(tmp_path / "b", blocks=2), dtype=torch.bfloat16, device=CPU)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        fused = model(ids).logits
        use_short_attention(model)
        assert model.config._attn_implementation != "sdpa"
        assert torch.equal(model(ids).logits, fused)


def test_fp32_models_stay_as_they_are(tmp_path):
    model = load_model(tiny_base(tmp_path / "b", blocks=1), dtype=torch.float32, device=CPU)
    use_short_attention(model)
    assert model.config._attn_implementation == "sdpa"
