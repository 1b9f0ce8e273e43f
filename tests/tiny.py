"""Tiny random models, tokenizers, data and parties, made offline in a moment; every test builds on these.

A tiny base is an ordinary Hugging Face folder: config.json, model.safetensors, tokenizer files. Its weights are drawn
with a large spread, norms and biases included, so that no mistake hides behind a zero, a one or uniform logits.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import pytest

from offsite.config import Method
from offsite.models.families.architectures import ARCHITECTURES, Architecture, architecture_of
from offsite.protocol.artifacts import Bundle
from offsite.protocol.contents import TOKENIZER_CONFIG, cleaned, tokenizer_digest
from offsite.protocol.home import Home
from offsite.protocol.manifest import BundleManifest, Split, TensorEntry
from offsite.protocol.sealing import file_entries, seal
from offsite.storage.checkpoint_folder import open_checkpoint, write_checkpoint
from offsite.storage.files import Written, staged_folder, write_stream
from offsite.storage.safetensors_files import NewTensor, copied, from_array

Family = Literal[
    "llama", "gpt2", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text", "stablelm", "phi",
    "phi3", "gptj", "gpt_neox", "opt", "bloom", "falcon", "mixtral", "qwen2_moe", "qwen3_moe",
]  # fmt: skip
MakeBase = Callable[..., Path]  # the fixture `base_of`
FAMILIES: tuple[Family, ...] = ("llama", "gpt2")  # what every test of a stage runs on
# Every row of the table in every form that its columns tell apart: what the tests of the whole chain run on.
KINDS: dict[str, dict[str, Any]] = {
    "llama tied, grouped": {"family": "llama", "tied": True},
    "llama untied": {"family": "llama", "tied": False},
    "llama, one key head": {"family": "llama", "kv_heads": 1},
    "llama, plain attention, biases": {"family": "llama", "kv_heads": 4, "attention_bias": True, "mlp_bias": True},
    "gpt2 tied": {"family": "gpt2"},
    "gpt2 untied": {"family": "gpt2", "tied": False},
    "mistral": {"family": "mistral"},
    "mistral with windows": {"family": "mistral", "sliding_window": 4},
    "qwen2": {"family": "qwen2"},
    "qwen2 tied, windows from block 2 on": {
        "family": "qwen2", "tied": True, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2,
    },
    "qwen3": {"family": "qwen3", "attention_bias": True},
    "mixtral": {"family": "mixtral"},
    "qwen2_moe": {"family": "qwen2_moe"},
    "qwen2_moe, dense blocks, windows": {
        "family": "qwen2_moe", "mlp_only_layers": [0, 3], "use_sliding_window": True, "sliding_window": 4,
        "qkv_bias": False,
    },
    "qwen3_moe": {"family": "qwen3_moe", "norm_topk_prob": True, "attention_bias": True},
    "qwen3_moe tied, every second block dense": {"family": "qwen3_moe", "tied": True, "decoder_sparse_step": 2},
    "smollm3": {
        "family": "smollm3", "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 4,
    },
    "gemma": {"family": "gemma"},
    "gemma2": {"family": "gemma2", "sliding_window": 4},
    "gemma3": {"family": "gemma3_text", "sliding_window": 4, "sliding_window_pattern": 3},
    "stablelm": {"family": "stablelm"},
    "stablelm, parallel, biases": {"family": "stablelm", "use_qkv_bias": True, "use_parallel_residual": True},
    "stablelm, a norm per head": {"family": "stablelm", "qk_layernorm": True},
    "phi": {"family": "phi"},
    "phi, norms of queries and keys": {"family": "phi", "qk_layernorm": True},
    "phi3": {"family": "phi3"},
    "gptj": {"family": "gptj"},
    "gpt_neox": {"family": "gpt_neox"},
    "gpt_neox, sequential, no biases": {"family": "gpt_neox", "use_parallel_residual": False, "attention_bias": False},
    "opt": {"family": "opt"},
    "opt, projections, norms behind": {"family": "opt", "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "bloom": {"family": "bloom"},
    "falcon, one key head": {"family": "falcon"},
    "falcon, new decoder": {"family": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon, new decoder, one norm": {
        "family": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1,
    },
    "falcon, alibi, sequential": {
        "family": "falcon", "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True,
    },
}  # fmt: skip
# One form of each kind of block: what `make test` runs of tests that run a model. `make test-all` runs all forms.
ONE_OF_EACH = {
    "llama tied, grouped": "RMS norms before, rotary positions, grouped heads, a gated MLP",
    "gpt2 tied": "layer norms, learned positions, biases, weights stored (in, out)",
    "qwen3": "norms of queries and keys, heads wider than the hidden size divides into",
    "phi3": "queries, keys and values in one matrix, gate and up in another",
    "qwen2_moe, dense blocks, windows": "experts and a shared one, dense blocks between, windows",
    "mixtral": "experts alone",
    "gemma2": "norms before and after, soft caps, windows of every second block",
    "gpt_neox": "attention and MLP in parallel, partial rotary positions",
    "opt, projections, norms behind": "norms after, embeddings narrower than the blocks",
    "bloom": "positions as biases of attention (ALiBi)",
    "vit": "an encoder with layer norms before and biases",
    "dinov2": "scales of each layer's output",
    "clip tower": "a tower of a model for pictures and text",
    "beit, relative positions": "biases of relative positions",
    "timm, eva": "an encoder of timm",
}

TEXT = (
    "The quick brown fox jumps over the lazy dog.",
    "Two parties who do not trust each other tune one model.",
    "The bundle goes out, the return comes back, and neither shows its secrets.",
    "def add(left, right): return left + right",
    "A model owner keeps the weights; a data owner keeps the rows.",
)
BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def each_form(kinds: Iterable[str], *more: Any) -> list[Any]:
    """Parameters of a test, one a form; those not in ONE_OF_EACH (all but the first, if none is) only by `every_form`.

    Args:
        kinds: names in KINDS or VISION_KINDS.
        more: values of the test's further arguments, the same for each form.
    """
    kinds = list(kinds)
    usual = ONE_OF_EACH.keys() & kinds or kinds[:1]
    return [pytest.param(kind, *more, marks=() if kind in usual else pytest.mark.every_form) for kind in kinds]


def tiny_tokenizer(
    folder: Path, *, pad: Literal["own", "eos"] = "own", bos: bool = True, adds_bos: bool = True
) -> Path:
    """Save a byte-level BPE tokenizer of about 320 tokens.

    Args:
        folder: where it goes; made if need be.
        pad: a padding token of its own, or the end token in its place, as SmolLM2 has it.
        bos: whether there is a beginning token at all.
        adds_bos: whether the tokenizer puts it in front by itself when asked for special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, wanted in ((PAD, pad == "own"), (BOS, bos), (EOS, True)) if wanted]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if bos and adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
    folder.mkdir(parents=True, exist_ok=True)
    names = {"eos_token": EOS, "pad_token": PAD if pad == "own" else EOS} | ({"bos_token": BOS} if bos else {})
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def tiny_base(
    folder: Path,
    family: Family = "llama",
    blocks: int = 6,
    *,
    tied: bool | None = None,
    kv_heads: int = 2,
    dtype: Literal["fp32", "bf16"] = "fp32",
    pad: Literal["own", "eos"] = "own",
    bos: bool = True,
    adds_bos: bool = True,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Save a tiny random model with its tokenizer; hidden size 32, 4 heads, 64 positions.

    Args:
        folder: where it goes.
        family: a row of the table of architectures.
        blocks: how many.
        tied: whether the head is the input embedding; None takes what published small models of the family do.
        kv_heads: Llama's key and value heads: 4 is plain attention, 2 or 1 is grouped (GPT-2 has no such setting).
        dtype: of the stored weights.
        pad, bos, adds_bos: see `tiny_tokenizer`.
        seed: of the weights.
        config: further settings of the family's config, over ours.

    Returns:
        The folder.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tiny_tokenizer(folder, pad=pad, bos=bos, adds_bos=adds_bos)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": (family == "llama" or ARCHITECTURES[family].tied_by_default) if tied is None else tied,
        **_SETTINGS[family](blocks, kv_heads),
        **config,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms and biases: away from one and zero
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(torch.bfloat16 if dtype == "bf16" else torch.float32).save_pretrained(folder)
    return folder


def tiny_config(kind: str, blocks: int, **config: Any) -> Any:
    """The transformers config of a kind, without a tokenizer or weights; sizes as in `tiny_base`."""
    from transformers import AutoConfig

    chosen: dict[str, Any] = KINDS[kind] | config
    family, kv_heads, tied = chosen.pop("family"), chosen.pop("kv_heads", 2), chosen.pop("tied", None)
    settings = _SETTINGS[family](blocks, kv_heads) | ({} if tied is None else {"tie_word_embeddings": tied}) | chosen
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return AutoConfig.for_model(family, vocab_size=320, **tokens, **settings)


def _llama_sizes(blocks: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": blocks,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 64,
        "initializer_range": 0.15,
        **more,
    }


def _gpt2_sizes(blocks: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {"n_layer": blocks, "n_embd": 32, "n_head": 4, "n_positions": 64, "initializer_range": 0.15, **more}


def _other_sizes(blocks: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {"num_hidden_layers": blocks, "hidden_size": 32, "num_attention_heads": 4, **more}


_SETTINGS: dict[str, Callable[..., dict[str, Any]]] = {
    "llama": partial(_llama_sizes, head_dim=8),
    "mistral": partial(_llama_sizes, head_dim=8),
    "qwen2": _llama_sizes,
    "qwen3": partial(_llama_sizes, head_dim=16),
    "mixtral": partial(_llama_sizes, head_dim=8, num_local_experts=4),
    "qwen2_moe": partial(
        _llama_sizes, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20, shared_expert_intermediate_size=24
    ),
    "qwen3_moe": partial(_llama_sizes, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20),
    "smollm3": _llama_sizes,
    "gemma": partial(_llama_sizes, head_dim=16),
    "gemma2": partial(_llama_sizes, head_dim=16, query_pre_attn_scalar=16, final_logit_softcapping=8.0),
    "gemma3_text": partial(_llama_sizes, head_dim=16, query_pre_attn_scalar=16),
    "stablelm": _llama_sizes,
    "phi": _llama_sizes,
    "phi3": partial(_llama_sizes, original_max_position_embeddings=64),
    "gpt2": _gpt2_sizes,
    "gptj": partial(_gpt2_sizes, rotary_dim=4),
    "gpt_neox": partial(_other_sizes, intermediate_size=48, max_position_embeddings=64, initializer_range=0.15),
    "opt": partial(_other_sizes, ffn_dim=48, max_position_embeddings=64, init_std=0.15),
    "bloom": lambda blocks, kv_heads: {"n_layer": blocks, "hidden_size": 32, "n_head": 4, "initializer_range": 0.15},
    "falcon": partial(_other_sizes, max_position_embeddings=64, initializer_range=0.15),
}


@dataclass(frozen=True)
class Parties:
    """Two homes that trust each other: the model owner "acme" and the data owner "hospital"."""

    owner: Home
    data_owner: Home


def tiny_parties(folder: Path) -> Parties:
    """Make both homes under `folder`, each with a key and with the other's key trusted."""
    parties = Parties(Home(folder / "acme-home"), Home(folder / "hospital-home"))
    acme = parties.owner.create_identity("acme")
    hospital = parties.data_owner.create_identity("hospital")
    parties.owner.trust("hospital", hospital.public_key)
    parties.data_owner.trust("acme", acme.public_key, "model-owner")
    return parties


def tiny_bundle(
    base: Path,
    out: Path,
    parties: Parties,
    *,
    bottom: int = 1,
    top: int = 1,
    keep: int | None = None,
    methods: tuple[Method, ...] = ("lora", "full", "bitfit", "bottleneck"),
    max_rank: int = 64,
    max_width: int = 64,
    dtype: Literal["F32", "BF16"] = "F32",
) -> Bundle:
    """Sign a bundle by hand, as model_owner.pack would by plain drop: the first `keep` blocks of the middle stay.

    `keep` None keeps all of the middle, so the bundle computes what the base does.
    """
    config = json.loads((base / "config.json").read_text())
    family = architecture_of(config)
    count = family.block_count(config)
    middle = count - bottom - top
    kept = middle if keep is None else keep
    stays = [*range(bottom + kept), *range(count - top, count)]
    split = Split(bottom=bottom, emulator=kept, top=top)
    tensors = list(_renumbered(base, family, stays, dtype))
    returnable = {
        tensor.name: tensor
        for tensor in tensors
        if (place := family.block_of(tensor.name)) is not None and place[0] in split.trained
    }
    targets = {
        family.in_block(index, path): _in_out(returnable[family.in_block(index, f"{path}.weight")].shape, family)
        for index in split.trained
        for path in family.lora_linears
    }
    with staged_folder(out) as staging:
        written = _copy_settings(base, staging, config, family, stays) + write_checkpoint(staging, tensors)
        manifest = BundleManifest(
            format=1,
            requires=(),
            files=file_entries(written),
            kind="bundle",
            issued_at="2026-01-01T00:00:00Z",
            issuer=parties.owner.identity().public_key.hex,
            recipient=parties.data_owner.identity().public_key.hex,
            base="0" * 64,
            tokenizer=tokenizer_digest(file_entries(written)),
            architecture=family.model_type,
            split=split,
            methods=methods,
            max_rank=max_rank,
            max_width=max_width,
            tensors={name: TensorEntry(shape=tensor.shape, dtype=dtype) for name, tensor in returnable.items()},
            lora_targets=targets,
        )
        return seal(staging, manifest, parties.owner.identity(), out)


def _renumbered(base: Path, family: Architecture, stays: Sequence[int], dtype: str) -> Sequence[NewTensor]:
    tensors = []
    for tensor in open_checkpoint(base).tensors.values():
        place = family.block_of(tensor.name)
        if place is None:
            tensors.append(copied(tensor, dtype=dtype))
        elif place[0] in stays:
            tensors.append(copied(tensor, name=family.in_block(stays.index(place[0]), place[1]), dtype=dtype))
    return tensors


def _in_out(shape: tuple[int, ...], family: Architecture) -> tuple[int, int]:
    """(in features, out features) of a linear map from its weight's shape."""
    return (shape[0], shape[1]) if family.transposed else (shape[1], shape[0])


def _copy_settings(
    base: Path, out: Path, config: dict[str, Any], family: Architecture, stays: Sequence[int]
) -> list[Written]:
    allowed = {key: value for key, value in family.subset(config, stays).items() if key in family.config_keys}
    written = [write_stream(out / "config.json", [json.dumps(allowed, indent=1).encode()])]
    settings = cleaned(TOKENIZER_CONFIG, json.loads((base / TOKENIZER_CONFIG).read_text()))
    written.append(write_stream(out / TOKENIZER_CONFIG, [json.dumps(settings).encode()]))
    copied_files = [name for name in ("tokenizer.json", "chat_template.jinja") if (base / name).exists()]
    return [*written, *(write_stream(out / name, [(base / name).read_bytes()]) for name in copied_files)]


def tiny_house(folder: Path, **bundles: dict[str, Any]) -> tuple[dict[str, Bundle], Path, Home]:
    """Bundles of a Llama of five blocks that keep two of the middle, by name with their settings; rows; who tunes."""
    parties = tiny_parties(folder)
    base = tiny_base(folder / "base", blocks=5)
    made = {name: tiny_bundle(base, folder / name, parties, keep=2, **own) for name, own in bundles.items()}
    return made, tiny_rows(folder / "rows.jsonl", 14), parties.data_owner


def tiny_rows(file: Path, count: int = 12, *, kind: Literal["prompt", "text"] = "prompt") -> Path:
    """Write rows of different lengths, all well under 64 tokens, to a JSONL file."""
    words = " ".join(TEXT).split()
    rows = []
    for i in range(count):
        start, length = (7 * i) % len(words), 3 + (5 * i) % 9
        picked = words[start : start + length] or words[:length]
        cut = max(1, len(picked) // 2)
        prompt, completion = " ".join(picked[:cut]), " " + " ".join(picked[cut:] or ["end"])
        rows.append({"prompt": prompt, "completion": completion} if kind == "prompt" else {"text": prompt + completion})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


# Every row of vision encoders in every form that its columns tell apart, with what their configs say beside the sizes.
VISION_KINDS: dict[str, dict[str, Any]] = {
    "vit": {"family": "vit"},
    "vit, no biases of queries": {"family": "vit", "qkv_bias": False},
    "deit": {"family": "deit"},
    "dinov2": {"family": "dinov2", "layerscale_value": 0.5},
    "dinov2, no mask token": {"family": "dinov2", "use_mask_token": False},
    "dinov2 with registers": {"family": "dinov2_with_registers", "num_register_tokens": 2},
    "clip tower": {"family": "clip_vision_model"},
    "siglip tower": {"family": "siglip_vision_model"},
    "beit, relative positions": {"family": "beit", "use_relative_position_bias": True},
    "beit, shared relative positions, class token": {
        "family": "beit", "use_shared_relative_position_bias": True, "use_absolute_position_embeddings": True,
        "use_mean_pooling": False, "use_mask_token": True,
    },
    "timm, eva": {"family": "timm_wrapper", "architecture": "eva_giant_patch14_224"},
    "timm, eva, class token": {"family": "timm_wrapper", "architecture": "eva_giant_patch14_clip_224"},
    "timm, eva02, one matrix": {"family": "timm_wrapper", "architecture": "eva02_tiny_patch14_224"},
    "timm, eva02, separate maps": {"family": "timm_wrapper", "architecture": "eva02_base_patch14_224"},
    "timm, vit": {"family": "timm_wrapper", "architecture": "vit_base_patch16_224"},
}  # fmt: skip
SIDE = 16  # pixels of a tiny encoder's image; patches are of 4


def tiny_vision_config(kind: str, blocks: int, **config: Any) -> Any:
    """The transformers config of a kind of encoder: hidden size 32, 4 heads, 16 patches of 4 pixels."""
    from transformers import AutoConfig

    chosen = VISION_KINDS[kind] | config
    sizes = {
        "hidden_size": 32, "num_hidden_layers": blocks, "num_attention_heads": 4, "image_size": SIDE, "patch_size": 4,
        "initializer_range": 0.15,
    }  # fmt: skip
    if "dinov2" not in chosen["family"]:
        sizes["intermediate_size"] = 48
    return AutoConfig.for_model(chosen.pop("family"), **(sizes | chosen))


def tiny_vision_base(
    folder: Path,
    kind: str = "vit",
    blocks: int = 5,
    *,
    classifier: bool = False,
    dtype: Literal["fp32", "bf16"] = "fp32",
    seed: int = 0,
    **config: Any,
) -> Path:
    """Save a tiny random encoder with its image processor; weights as in `tiny_base`, all of them away from 0 and 1.

    Args:
        folder: where it goes.
        kind: of VISION_KINDS.
        blocks: how many.
        classifier: as a classifier with the owner's own head of 3 classes, where transformers has one of the type.
        dtype: of the stored weights.
        seed: of the weights.
        config: further settings of the family's config.
    """
    if "architecture" in VISION_KINDS[kind]:
        return _tiny_timm_base(folder, VISION_KINDS[kind]["architecture"], blocks, classifier, dtype, seed)
    import torch
    from transformers import AutoModel, AutoModelForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    settings = tiny_vision_config(kind, blocks, architectures=[], **config)
    if classifier:
        settings.id2label = {0: "SECRET-one", 1: "SECRET-two", 2: "SECRET-three"}
        settings.label2id = {name: index for index, name in settings.id2label.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (AutoModelForImageClassification if classifier else AutoModel).from_config(settings)
        with torch.no_grad():
            for parameter in model.parameters():
                spread = 0.1 if parameter.dim() == 1 else 0.15
                parameter.add_(torch.randn_like(parameter) * spread)
    model.to(torch.bfloat16 if dtype == "bf16" else torch.float32).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def _tiny_timm_base(folder: Path, architecture: str, blocks: int, classifier: bool, dtype: str, seed: int) -> Path:
    """By the row of the table alone, so that it is there where timm is not."""
    import numpy as np
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    family, draw = ARCHITECTURES["timm_wrapper"], np.random.default_rng(seed)
    config: dict[str, Any] = {
        "model_type": family.model_type, "architectures": [family.class_name], "architecture": architecture,
        "hidden_size": 32, "num_hidden_layers": blocks, "num_attention_heads": 4, "intermediate_size": 48,
        "image_size": SIDE, "patch_size": 4, "dtype": {"bf16": "bfloat16", "fp32": "float32"}[dtype],
    }  # fmt: skip
    config |= {**family.fixed_settings, **family.computed_settings(config)}
    paths = [
        family.in_block(index, path) for index in range(blocks) for path in sorted(family.block_tensors(config, index))
    ]
    values: dict[str, Any] = {}
    for name in (*sorted(family.outer_tensors(config)), *paths):
        factors = [product.split("*") for product in (family.sizes_of(name) or "").split()]
        shape = [int(np.prod([int(f) if f.isdigit() else config[f] for f in product])) for product in factors]
        is_norm = "norm" in name and name.endswith("weight")
        values[name] = draw.normal(1.0 if is_norm else 0.0, 0.1 if len(shape) == 1 else 0.15, shape)
    if classifier:
        config |= {"label_names": ["SECRET-one", "SECRET-two", "SECRET-three"], "num_classes": 3}
        config["architectures"] = ["TimmWrapperForImageClassification"]
        values |= {"head.weight": draw.normal(0, 0.1, (3, 32)), "head.bias": draw.normal(0, 0.1, 3)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    kind = {"bf16": "BF16", "fp32": "F32"}[dtype]
    write_checkpoint(folder, [from_array(name, value.astype(np.float32), kind) for name, value in values.items()])
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


@cache
def timm_imports() -> bool:
    """Whether timm can be imported here; beside a torchvision for another torch it fails in its own way."""
    try:
        import timm  # type: ignore[import-not-found,import-untyped,unused-ignore] # noqa: F401
    except (ImportError, RuntimeError):
        return False
    return True


def tiny_pictures(folder: Path, per_class: int = 6, *, seed: int = 0) -> Path:
    """Write pictures of three classes that differ in colour, of different sizes, as sub-folders of PNG files."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(seed)
    for name, channel in (("blue", 2), ("green", 1), ("red", 0)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            height, width = draw.integers(12, 30, size=2)
            pixels = draw.integers(0, 120, size=(height, width, 3), dtype=np.uint8)
            pixels[..., channel] += 110
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


EVERY_KIND, EVERY_VISION_KIND = each_form(KINDS), each_form(VISION_KINDS)

assert KINDS.keys() | VISION_KINDS.keys() >= ONE_OF_EACH.keys()
assert {row.model_type for row in ARCHITECTURES.values() if row.vision} == {
    kind["family"] for kind in VISION_KINDS.values()
}
LANGUAGE = [name for name, row in ARCHITECTURES.items() if row.vision is None]
assert set(_SETTINGS) == set(LANGUAGE) == {kind["family"] for kind in KINDS.values()}
