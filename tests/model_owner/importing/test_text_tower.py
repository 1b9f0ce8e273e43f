"""The language model of a multi-modal checkpoint computes on texts what the whole model does, in every spelling."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from artifacts import edit_json
from model_owner.test_pack import plain
from offsite.errors import IncompatibleError
from offsite.model_owner.base_model import open_base
from offsite.model_owner.importing.import_model import import_model
from offsite.model_owner.importing.import_record import read_record
from offsite.protocol.artifacts import Base
from offsite.storage.checkpoint_folder import WEIGHTS
from tiny import tiny_tokenizer

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
ROWS = {"vocab_size": 320, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {**SIZES, **ROWS, "num_key_value_heads": 2}
CLIP = {**SIZES, "num_hidden_layers": 2, "image_size": 16, "patch_size": 4}
PIXTRAL = {**CLIP, "model_type": "pixtral", "head_dim": 8}
QWEN_VISION = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 1}
AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}


def llava(text: str, vision: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    shown = vision or {"model_type": "clip_vision_model", **CLIP}
    return {
        "text_config": {"model_type": text, **GROUPED}, "vision_config": shown, "image_token_index": 319,
        "image_token_id": 319, "tie_word_embeddings": False, **more,
    }  # fmt: skip


# For each form: the model type, its settings, and the type of the base.
FORMS: dict[str, tuple[str, dict[str, Any], str]] = {
    "gemma3": (
        "gemma3",
        {
            "text_config": {**GROUPED, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
            "vision_config": {"model_type": "siglip_vision_model", **CLIP}, "mm_tokens_per_image": 4,
            "image_token_index": 319,
        },
        "gemma3_text",
    ),
    "llava": ("llava", llava("llama"), "llama"),
    "llava, tied": ("llava", llava("llama", tie_word_embeddings=True), "llama"),
    "pixtral": ("llava", llava("mistral", PIXTRAL), "mistral"),
    "llava_next": ("llava_next", llava("mistral", image_grid_pinpoints=[[16, 16]]), "mistral"),
    "llava_onevision": ("llava_onevision", llava("qwen2", image_grid_pinpoints=[[16, 16]]), "qwen2"),
    "vipllava": ("vipllava", llava("llama", vision_feature_layers=[-1, -2]), "llama"),
    "mistral3": ("mistral3", llava("mistral", PIXTRAL, spatial_merge_size=1), "mistral"),
    "internvl": ("internvl", llava("qwen2", {**CLIP, "image_size": [16, 16], "patch_size": [4, 4]}), "qwen2"),
    "qwen2_vl": (
        "qwen2_vl",
        {"text_config": {**GROUPED, **AXES},
         "vision_config": {**QWEN_VISION, "embed_dim": 16, "hidden_size": 32, "num_heads": 2}},
        "qwen2",
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        {"text_config": {**GROUPED, **AXES}, "vision_config": {**QWEN_VISION, "hidden_size": 16, "out_hidden_size": 32,
                                                               "intermediate_size": 24, "fullatt_block_indexes": [0]}},
        "qwen2",
    ),
    "qwen3_vl": (
        "qwen3_vl",
        {"text_config": {**GROUPED, **AXES, "head_dim": 8}, "tie_word_embeddings": True,
         "vision_config": {**QWEN_VISION, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24,
                           "deepstack_visual_indexes": [0], "num_position_embeddings": 16}},
        "qwen3",
    ),
    # language models without a row in the table
    "llava, olmo2": ("llava", llava("olmo2"), "olmo2"),
    "llava_next, granite": ("llava_next", llava("granite", image_grid_pinpoints=[[16, 16]]), "granite"),
    "mllama": (
        "mllama",
        {
            "text_config": {**GROUPED, "num_hidden_layers": 5, "cross_attention_layers": [1, 3],
                            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
            "vision_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2,
                              "intermediate_size": 24, "vision_output_dim": 32, "image_size": 16, "patch_size": 4,
                              "intermediate_layers_indices": [0], "max_num_tiles": 1,
                              "supported_aspect_ratios": [[1, 1]]},
            "image_token_index": 319,
        },
        "llama",
    ),
    "idefics2": (
        "idefics2",
        {"text_config": {"model_type": "mistral", **GROUPED}, "vision_config": {**CLIP}, "image_token_id": 319,
         "perceiver_config": {"hidden_size": 32, "resampler_n_latents": 2, "resampler_depth": 1, "resampler_n_heads": 2,
                              "resampler_head_dim": 8, "num_key_value_heads": 2},
         "tie_word_embeddings": False},
        "mistral",
    ),
    "idefics3": (
        "idefics3",
        {"text_config": {"model_type": "llama", **GROUPED}, "vision_config": {**CLIP}, "image_token_id": 319,
         "scale_factor": 2, "tie_word_embeddings": False},
        "llama",
    ),
    "smolvlm": (
        "smolvlm",
        {"text_config": {"model_type": "llama", **GROUPED}, "vision_config": {**CLIP}, "image_token_id": 319,
         "scale_factor": 2, "tie_word_embeddings": True},
        "llama",
    ),
    "blip-2": (
        "blip-2",
        {"text_config": {"model_type": "opt", **SIZES, **ROWS, "ffn_dim": 48, "word_embed_proj_dim": 32},
         "vision_config": {**CLIP}, "image_token_index": 319,
         "qformer_config": {**SIZES, "num_hidden_layers": 1, "encoder_hidden_size": 32, "vocab_size": 10}},
        "opt",
    ),
    "qwen2_audio": (
        "qwen2_audio",
        {"text_config": {"model_type": "qwen2", **GROUPED}, "audio_token_index": 319,
         "audio_config": {"model_type": "qwen2_audio_encoder", "d_model": 16, "encoder_layers": 1,
                          "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "num_mel_bins": 8,
                          "max_source_positions": 8}},
        "qwen2",
    ),
}  # fmt: skip
PALIGEMMA = (
    "paligemma",
    llava("gemma", {"model_type": "siglip_vision_model", **CLIP, "projection_dim": 32}, hidden_size=32,
          projection_dim=32, tie_word_embeddings=True),
    "gemma",
)  # fmt: skip
AYA = (
    "aya_vision",
    llava("cohere2", {"model_type": "siglip_vision_model", **CLIP}, tie_word_embeddings=True),
    "cohere2",
)
USUAL = ("gemma3", "llava", "llava, olmo2", "qwen2_vl", "mllama", "idefics3")
EACH = [pytest.param(form, marks=() if form in USUAL else pytest.mark.every_form) for form in FORMS]
IDS = torch.tensor([[1, 5, 9, 200, 31, 64, 65, 300, 17, 2, 40, 41]])


def whole_model(folder: Path, form: str, dtype: torch.dtype = torch.float32) -> tuple[Path, Any]:
    """A tiny multi-modal model with weights of a large spread, saved with a tokenizer, and the model itself."""
    from transformers import AutoConfig, AutoModelForMultimodalLM

    kind, settings, _ = {**FORMS, "paligemma": PALIGEMMA, "aya_vision": AYA}[form]
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder, model


def text_logits(model: Any) -> torch.Tensor:
    if model.config.model_type == "blip-2":  # as a whole it takes no text without a picture
        model = model.language_model
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("form", EACH)
def test_the_tower_computes_on_texts_what_the_whole_model_does(tmp_path: Path, form: str) -> None:
    source, model = whole_model(tmp_path / "whole", form)
    made = import_model(source, tmp_path / "base")
    opened = open_base(Base(made.folder))
    assert opened.family.model_type == FORMS[form][2]
    expected, found = text_logits(model), text_logits(plain(made.folder))
    assert expected.std() > 0.1
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    record = read_record(made.folder)
    assert record.tower_of == FORMS[form][0]
    assert "language model" in record.notes[0]
    held = load_file(source / WEIGHTS)
    assert set(record.tensors) >= set(opened.tensors)
    assert sum(record.left_out.values()) == len(held) - len({place.name for place in record.tensors.values()})
    assert not any("lm_head" in part or "embed_tokens" in part for part in record.left_out)
    assert (made.folder / "tokenizer.json").exists()


SPELLINGS = {
    "before 2025": {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.",
                    "model.vision_tower.": "vision_tower.", "model.multi_modal_projector.": "multi_modal_projector."},
    "today": {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head.",
              "vision_tower.": "model.vision_tower.", "multi_modal_projector.": "model.multi_modal_projector."},
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(tmp_path: Path, spelling: str) -> None:
    source, model = whole_model(tmp_path / "whole", "llava")
    tensors = {}
    for name, tensor in load_file(source / WEIGHTS).items():
        start = next((old for old in SPELLINGS[spelling] if name.startswith(old)), "")
        tensors[SPELLINGS[spelling].get(start, "") + name.removeprefix(start)] = tensor
    save_file(tensors, source / WEIGHTS, {"format": "pt"})
    made = import_model(source, tmp_path / "base")
    assert torch.allclose(text_logits(plain(made.folder)), text_logits(model), rtol=1e-4, atol=1e-4)


def test_flat_settings_of_qwen2_vl(tmp_path: Path) -> None:
    """As published in 2024: the settings of the language model at the top, tensors without a part of their name."""
    source, model = whole_model(tmp_path / "whole", "qwen2_vl")
    config = json.loads((source / "config.json").read_text())
    text = config.pop("text_config")
    rotary = text.pop("rope_parameters", None) or AXES["rope_parameters"]
    flat = {**text, **config, "rope_theta": rotary["rope_theta"],
            "rope_scaling": {"type": "mrope", "mrope_section": rotary["mrope_section"]}}  # fmt: skip
    (source / "config.json").write_text(json.dumps({**flat, "model_type": "qwen2_vl"}))
    tensors = {name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
               for name, tensor in load_file(source / WEIGHTS).items()}  # fmt: skip
    save_file(tensors, source / WEIGHTS, {"format": "pt"})
    made = import_model(source, tmp_path / "base")
    assert torch.allclose(text_logits(plain(made.folder)), text_logits(model), rtol=1e-4, atol=1e-4)


def test_a_missing_tensor_of_the_tower_is_named(tmp_path: Path) -> None:
    source, _ = whole_model(tmp_path / "whole", "llava")
    tensors = load_file(source / WEIGHTS)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.down_proj.weight"))
    del tensors[name]
    save_file(tensors, source / WEIGHTS, {"format": "pt"})
    with pytest.raises(IncompatibleError) as caught:
        import_model(source, tmp_path / "base")
    assert caught.value.reasons == ("missing model.layers.1.mlp.down_proj.weight",)
    assert not (tmp_path / "base").exists()


def test_a_chat_template_of_the_processor(tmp_path: Path) -> None:
    source, _ = whole_model(tmp_path / "whole", "llava")
    (source / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    made = import_model(source, tmp_path / "base")
    assert (made.folder / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_tower_that_reads_in_both_directions_is_refused(tmp_path: Path) -> None:
    source, _ = whole_model(tmp_path / "whole", "paligemma")
    with pytest.raises(IncompatibleError) as caught:
        import_model(source, tmp_path / "base")
    assert "use_bidirectional_attention" in caught.value.reasons[0]


def test_a_scale_that_transformers_leaves_out_of_the_whole_model_is_said(tmp_path: Path) -> None:
    source, model = whole_model(tmp_path / "whole", "aya_vision")
    made = import_model(source, tmp_path / "base")
    scale = model.config.text_config.logit_scale
    assert any(f"logit_scale = {scale:g}" in note for note in read_record(made.folder).notes)
    assert scale != 1
    found = text_logits(plain(made.folder))
    torch.testing.assert_close(found, text_logits(model) * scale, atol=1e-4, rtol=1e-4)


def test_models_that_need_code_of_their_own(tmp_path: Path) -> None:
    source, _ = whole_model(tmp_path / "whole", "llava")
    edit_json(source / "config.json", model_type="internvl_chat", auto_map={"AutoConfig": "x.C"})
    with pytest.raises(IncompatibleError, match="does not know the multi-modal model") as caught:
        import_model(source, tmp_path / "base")
    assert "-hf" in str(caught.value.next_step)
