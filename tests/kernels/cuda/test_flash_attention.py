"""What of the CUDA backend's attention runs without a device."""

import numpy as np
import pytest
import torch
from transformers.masking_utils import chunked_causal_mask_function, sliding_window_causal_mask_function

from offsite.data.batches import collate
from offsite.data.examples import Example
from offsite.kernels import prepare
from offsite.kernels.cuda import flash_attention
from offsite.kernels.cuda.flash_attention import mask_of_right_padded_rows, use_flash_attention
from offsite.models.backbone import split_backbone_and_head
from offsite.models.loading import load_model
from offsite.training.label_losses import label_losses
from tiny import EVERY_KIND, KINDS, tiny_base

CPU = torch.device("cpu")
PADDED = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def test_right_padded_rows_need_no_mask():
    assert mask_of_right_padded_rows(2, 4, 4, attention_mask=PADDED) is None
    window = {"mask_function": sliding_window_causal_mask_function(4), "local_size": 4, "allow_is_causal_skip": True}
    assert mask_of_right_padded_rows(2, 4, 4, attention_mask=PADDED, **window) is None


def test_whether_it_needs_one_is_found_without_a_look_at_the_rows():
    """On the meta device every look at a value raises; on a card it would make the host wait."""
    there = torch.ones(2, 4, dtype=torch.bool, device="meta")
    assert mask_of_right_padded_rows(2, 4, 4, attention_mask=there, device="meta") is None
    window = sliding_window_causal_mask_function(2)
    mask = mask_of_right_padded_rows(
        2, 4, 4, attention_mask=there, mask_function=window, local_size=2, allow_is_causal_skip=True, device="meta"
    )
    assert mask.shape[-2:] == (4, 4)


@pytest.mark.parametrize(
    "named",
    [
        {"mask_function": sliding_window_causal_mask_function(2), "local_size": 2, "allow_is_causal_skip": True},
        {"mask_function": chunked_causal_mask_function(2, torch.zeros(2, dtype=torch.long)), "local_size": 2},
        {"allow_is_causal_skip": False},
    ],
)
def test_what_the_causal_rule_does_not_say_is_masked(named):
    mask = mask_of_right_padded_rows(2, 4, 4, attention_mask=PADDED.bool(), **named)
    assert mask.dtype == torch.bool
    assert not mask[1, 0, :, 2:].any()  # the padding
    assert mask[0, 0].triu(1).sum() == 0


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_losses_are_those_of_a_dense_mask(tmp_path, kind, monkeypatch):
    model = load_model(tiny_base(tmp_path / "b", blocks=2, **KINDS[kind]), dtype=torch.float32, device=CPU)
    generator = np.random.default_rng(0)
    batch = collate([Example(i, generator.integers(0, 300, length), 2) for i, length in enumerate((5, 30, 17))])
    network = split_backbone_and_head(model)
    expected = label_losses(network, batch)[1]
    masks = []

    def counted(*given, **named):
        masks.append(mask_of_right_padded_rows(*given, **named))
        return masks[-1]

    monkeypatch.setattr(flash_attention, "mask_of_right_padded_rows", counted)
    piece = use_flash_attention(model)
    torch.testing.assert_close(label_losses(network, batch)[1], expected, rtol=1e-5, atol=1e-5)
    assert bool(masks) == bool(piece.count)
    if KINDS[kind]["family"] in ("llama", "gpt2"):  # others make masks of windows too
        assert masks == [None] * len(masks)


def test_the_backend_reports_what_is_missing(tmp_path, monkeypatch):
    """Everything but the device itself: `prepare` is told that the model is on one."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    model = load_model(tiny_base(tmp_path / "b", blocks=2), dtype=torch.float32, device=CPU)
    report = prepare(model, torch.device("cuda"), torch.float32)
    pieces = {piece.name: piece for piece in report.pieces}
    assert report.backend == "cuda"
    assert pieces["attention"].count == 2
    assert "liger-kernel is not installed" in pieces["RMS norms"].reason
    assert "liger-kernel is not installed" in pieces["gated MLPs"].reason
    assert pieces["bf16 as compute dtype"].reason == "the device only emulates bf16"
