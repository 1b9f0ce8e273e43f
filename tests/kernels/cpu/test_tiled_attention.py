import numpy as np
import pytest
import torch
from torch import nn

from offsite.data.batches import collate
from offsite.data.examples import Example
from offsite.kernels.cpu import compiled_kernels as kernels
from offsite.kernels.cpu import tiled_attention as attention
from offsite.kernels.cpu.thread_dropout import OwnRandomness
from offsite.kernels.cpu.tiled_attention import use_tiled_attention
from offsite.models.backbone import split_backbone_and_head
from offsite.models.loading import load_model
from offsite.training.label_losses import label_losses
from tiny import EVERY_KIND, KINDS, VISION_KINDS, each_form, tiny_base, tiny_vision_base

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_kernels(request, monkeypatch):
    """What is made of torch's products, unless a test is of the compiled ones."""
    if "compiled" not in request.fixturenames:
        monkeypatch.setattr(kernels, "attends", lambda *tensors: False)


@pytest.fixture
def compiled():
    if kernels.level()[0] < 2:
        pytest.skip("no matrix tiles here, or nothing was compiled")


def losses_and_gradient(model, examples):
    weight = model.get_input_embeddings().weight.requires_grad_(True)
    weight.grad = None
    total, nats = label_losses(split_backbone_and_head(model), collate(examples))
    total.backward()
    return nats, weight.grad


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize(("lengths", "tile"), [((12, 12), None), ((5, 30, 17), 8)], ids=["at once", "padded, in tiles"])
@pytest.mark.parametrize(("dtype", "close"), [(torch.bfloat16, 0.15), (torch.float32, 1e-4)], ids=["bf16", "fp32"])
def test_it_computes_what_the_fused_one_does(tmp_path, kind, lengths, tile, dtype, close, monkeypatch):
    model = load_model(tiny_base(tmp_path / "b", blocks=2, **KINDS[kind]), dtype=dtype, device=CPU)
    generator = np.random.default_rng(0)
    examples = [Example(i, generator.integers(0, 300, length), 1) for i, length in enumerate(lengths)]
    fused = losses_and_gradient(model, examples)
    through_interface = model._supports_attention_backend and model.config._attn_implementation == "sdpa"
    assert through_interface or KINDS[kind]["family"] in ("gemma2", "stablelm", "gptj", "bloom", "falcon")
    use_tiled_attention(model)
    calls = []
    tiled = attention.tiled_attention
    at_once = attention.attention_at_once
    monkeypatch.setattr(
        attention, "attention_at_once", lambda *inputs, **kind: calls.append(1) or at_once(*inputs, **kind)
    )
    if tile:
        monkeypatch.setattr(attention, "TILE", tile)
        monkeypatch.setattr(
            attention, "tiled_attention", lambda *inputs, **kind: calls.append(1) or tiled(*inputs, **kind)
        )
    short = losses_and_gradient(model, examples)
    assert len(calls) == (2 if through_interface else 0)  # once a block: it did run
    assert (fused[0] - short[0]).abs().max() < close
    cosine = torch.nn.functional.cosine_similarity(fused[1].float().flatten(), short[1].float().flatten(), dim=0)
    assert cosine > 0.995


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_the_compiled_one_computes_what_the_fused_one_does(tmp_path, kind, compiled, monkeypatch):
    model = load_model(tiny_base(tmp_path / "b", blocks=2, **KINDS[kind]), dtype=torch.bfloat16, device=CPU)
    generator = np.random.default_rng(0)
    examples = [Example(i, generator.integers(0, 300, length), 1) for i, length in enumerate((5, 30, 17))]
    fused = losses_and_gradient(model, examples)
    through_interface = model._supports_attention_backend and model.config._attn_implementation == "sdpa"
    use_tiled_attention(model)
    calls = []
    run = kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda *given: calls.append(1) or run(*given))
    found = losses_and_gradient(model, examples)
    windows = "sliding_window" in KINDS[kind]  # shorter than the rows
    assert len(calls) == 2 * through_interface or (windows and len(calls) < 2)
    assert (fused[0] - found[0]).abs().max() < 0.15
    cosine = torch.nn.functional.cosine_similarity(fused[1].float().flatten(), found[1].float().flatten(), dim=0)
    assert cosine > 0.995


def test_dropout_of_the_compiled_one_is_of_the_thread(compiled):
    query, key, value = (random_inputs(40, torch.bfloat16)[0].detach().requires_grad_(True) for _ in range(3))
    before = torch.get_rng_state()

    def attended(seed, dropout=0.3):
        with OwnRandomness(seed):
            return attention._attend(nn.Module(), query, key, value, None, dropout)[0]

    assert torch.equal(attended(1), attended(1))
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.allclose(attended(1), attended(2), atol=0.1)
    assert not torch.allclose(attended(1), attended(1, 0.0), atol=0.1)


@pytest.mark.parametrize("kind", each_form(kind for kind in VISION_KINDS if "timm" not in kind))
@pytest.mark.parametrize("tile", [None, 8], ids=["at once", "in tiles"])
def test_encoders_compute_and_learn_what_they_did(tmp_path, kind, tile, monkeypatch):
    model = load_model(tiny_vision_base(tmp_path / "b", kind, blocks=2), dtype=torch.bfloat16, device=CPU)
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()

    def features_and_gradient():
        features = model(pixel_values=pixels).last_hidden_state
        return features.detach(), torch.autograd.grad(features.float().square().sum(), pixels)[0]

    fused = features_and_gradient()
    through_interface = model._supports_attention_backend and model.config._attn_implementation == "sdpa"
    use_tiled_attention(model)
    calls = []
    whole = {"attention_at_once": attention.attention_at_once, "tiled_attention": attention.tiled_attention}
    for name, run in whole.items():
        monkeypatch.setattr(attention, name, lambda *q, run=run, **kind: calls.append(kind) or run(*q, **kind))
    if tile:
        monkeypatch.setattr(attention, "TILE", tile)
    ours = features_and_gradient()
    assert through_interface
    assert calls == [{"causal": False}] * 2  # once a block
    for one, other in zip(fused, ours, strict=True):
        cosine = torch.nn.functional.cosine_similarity(one.float().flatten(), other.float().flatten(), dim=0)
        assert cosine > 0.995


def test_without_a_gradient_the_fused_one_runs(tmp_path, monkeypatch):
    model = load_model(tiny_base(tmp_path / "b", blocks=2), dtype=torch.bfloat16, device=CPU)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        fused = model(ids).logits
        use_tiled_attention(model)
        assert model.config._attn_implementation != "sdpa"
        assert torch.equal(model(ids).logits, fused)


def test_of_pictures_in_fp32_the_fused_one_runs(tmp_path, monkeypatch):
    model = load_model(tiny_vision_base(tmp_path / "b", "vit", blocks=1), dtype=torch.float32, device=CPU)
    use_tiled_attention(model)
    for name in ("attention_at_once", "tiled_attention"):
        monkeypatch.delattr(attention, name)
    model(pixel_values=torch.randn(1, 3, 16, 16).requires_grad_()).last_hidden_state.sum().backward()


def by_the_book(query, key, value, scale, lives=None, *, causal=True):
    """Shares of every query in one product, as papers write it."""
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
    length = query.shape[2]
    hidden = ~torch.ones(length, length).bool().tril() & causal
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(hidden, -torch.inf)
    shares = scores.softmax(-1) if lives is None else scores.softmax(-1) * lives
    return (shares @ value).transpose(1, 2)


def random_inputs(length, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, length, 8) for heads in (6, 2, 2)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(True) for shape in shapes]


@pytest.mark.parametrize("length", [1, 100, 128, 129, 300, 600])
@pytest.mark.parametrize("pieces", [2**20, 2**15], ids=["all rows at once", "few rows at once"])
@pytest.mark.parametrize("causal", [True, False])
def test_tiles_are_the_whole(length, pieces, causal, monkeypatch):
    monkeypatch.setattr(
        attention, "PROBABILITIES_AT_ONCE", pieces
    )  # few: of 300 tokens that see all, queries are cut too
    inputs = random_inputs(length, torch.float32)
    expected = by_the_book(*inputs, 0.3, causal=causal)
    found = attention.tiled_attention(*inputs, 0.3, causal=causal)
    assert torch.allclose(expected, found, atol=1e-5)
    grad_output = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for one, other in zip(
        torch.autograd.grad(expected, inputs, grad_output), torch.autograd.grad(found, inputs, grad_output), strict=True
    ):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize(
    ("length", "tile"), [(100, 100), (448, 128), (512, 128), (513, 256), (1023, 256), (2048, 512), (4096, 256)]
)
def test_long_rows_have_few_tiles_and_their_shares_fit_the_cache(length, tile):
    kind = attention._Kind(0, None, causal=True)
    assert attention._tile(length, kind) == tile


@pytest.mark.parametrize("length", [7, 199, 1023])
def test_causal_rows_of_shares_have_an_even_length(length):
    queries, kind = torch.zeros(2, 3 * length, 8), attention._Kind(0, None, causal=True)
    keys = attention._together(torch.zeros(1, 2, length, 8), kind)
    widths = [shares.shape[-1] for *_, shares, _ in attention._pieces(queries, keys, 3, kind)]
    assert widths
    assert all(width % 16 == 0 for width in widths)


@pytest.mark.parametrize("length", [40, 200])
def test_dropout_takes_the_share_that_was_asked_for_and_the_same_backwards(length):
    query, key, value = random_inputs(length, torch.float32)
    torch.manual_seed(0)
    seeds = torch.get_rng_state()
    found = attention.tiled_attention(query, key, value, 0.3, 0.25)
    torch.set_rng_state(seeds)
    units = torch.eye(length).expand(2, 2, length, length)  # values that show each share

    def shown(dropout):
        torch.set_rng_state(seeds)
        wide = [torch.nn.functional.pad(part, (0, length - 8)) for part in (query, key)]
        return attention.tiled_attention(*wide, units, 0.3, dropout).transpose(1, 2).detach()

    lives = (shown(0.25) > 0).float()
    causal = torch.ones(length, length).tril().bool()
    assert abs(float(lives[..., causal].mean()) - 0.75) < 0.01
    expected = by_the_book(query, key, value, 0.3, lives / 0.75)
    assert torch.allclose(expected, found, atol=1e-4)
    grad_output = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for one, other in zip(
        torch.autograd.grad(expected, (query, key, value), grad_output),
        torch.autograd.grad(found, (query, key, value), grad_output),
        strict=True,
    ):
        assert torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize(
    ("length", "width", "masked", "gradient"),
    [(500, 8, True, True), (20, 8, False, False), (300, 8, False, False), (300, 6, False, True)],
)
def test_dropout_is_of_the_thread_wherever_there_is_any(length, width, masked, gradient):
    generator = torch.Generator().manual_seed(0)
    query, key, wide = (torch.randn(1, 2, length, 8, generator=generator) for _ in range(3))
    value = wide[..., :width].contiguous()
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None] if masked else None
    before = torch.get_rng_state()

    def attended(dropout):
        with OwnRandomness(1):
            return attention._attend(nn.Module(), query.requires_grad_(gradient), key, value, mask, dropout)[0]

    found, same, none = attended(0.3), attended(0.3), attended(0.0)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(found, same)
    assert found.shape == none.shape == (1, length, 2, width)
    assert not torch.allclose(found, none, atol=0.1)


@pytest.mark.parametrize(("window", "length", "masked"), [(8, 8, False), (8, 9, True)])
def test_a_window_as_long_as_the_rows_masks_nothing(window, length, masked):
    from transformers.masking_utils import sliding_window_causal_mask_function

    function = sliding_window_causal_mask_function(window)
    mask = attention._mask(
        1, length, length, mask_function=function, allow_is_causal_skip=True, local_size=window, use_vmap=False
    )
    assert (mask is not None) == masked


def test_rows_padded_at_the_left_are_masked():
    at_right, at_left = torch.tensor([[1, 1, 1], [1, 1, 0]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    assert attention._mask(2, 3, 3, attention_mask=at_right) is None
    assert attention._mask(2, 3, 3, attention_mask=at_left.bool())[1, 0].tolist()[2] == [False, True, True]
    assert attention._mask(2, 1, 3, attention_mask=at_right.bool(), q_offset=2)[1, 0].tolist() == [[True, True, False]]
