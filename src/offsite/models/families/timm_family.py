"""The family of timm's EVA and plain vision transformers, inside transformers' wrapper for timm. Torch-free.

The wrapper's config names a function of timm and its arguments, so a config from the other party is limited:
`architecture` is a key of FORMS, and `model_args` is exactly the value computed from the other sizes
(docs/decisions/0020-timm.md).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from offsite.models.families.family import Architecture, Vision


@dataclass(frozen=True)
class Form:
    """How the architecture of one of timm's models differs from that of the others, apart from its sizes."""

    heads: int  # number of attention heads of the published model
    separate: bool = False  # linear layers for each of queries, keys and values, and a gated MLP with a norm inside
    gates: int = 1  # 2: gate and value of a gated MLP in one matrix
    whole_bias: bool = False  # one bias for queries, keys and values; else keys have no bias
    pooled_norm: bool = True  # the last norm follows the mean of patches; else the class token is read after it


FORMS: Mapping[str, Form] = {
    "eva_giant_patch14_clip_224": Form(16, pooled_norm=False),
    **{f"eva_giant_patch14_{side}": Form(16) for side in (224, 336, 560)},
    **{f"eva02_tiny_patch14_{side}": Form(3, gates=2) for side in (224, 336)},
    **{f"eva02_small_patch14_{side}": Form(6, gates=2) for side in (224, 336)},
    **{f"eva02_base_patch14_{side}": Form(12, separate=True) for side in (224, 448)},
    **{f"eva02_large_patch14_{side}": Form(16, separate=True) for side in (224, 448)},
    **{
        f"vit_{name}": Form(heads, whole_bias=True, pooled_norm=False)
        for name, heads in (
            ("tiny_patch16_224", 3), ("tiny_patch16_384", 3), ("small_patch16_224", 6), ("small_patch16_384", 6),
            ("small_patch32_224", 6), ("base_patch16_224", 12), ("base_patch16_384", 12), ("base_patch32_224", 12),
            ("base_patch8_224", 12), ("large_patch16_224", 16), ("large_patch16_384", 16),
        )
    },
}  # fmt: skip


def model_args(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The keyword arguments of timm's function that builds the model; None if a size in the config is not positive."""
    keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "image_size", "patch_size", "intermediate_size")
    sizes = [config.get(key) for key in keys]
    if any(type(size) is not int or size < 1 for size in sizes):
        return None
    depth, hidden, heads, side, patch, inner = (int(size) for size in sizes if size)
    # timm truncates the product of ratio and hidden size, so rounding must not make it smaller than the size
    ratio = (inner + 0.5) / hidden
    return {
        "depth": depth, "embed_dim": hidden, "num_heads": heads, "mlp_ratio": ratio, "img_size": side,
        "patch_size": patch,
    }  # fmt: skip


def _positions(config: Mapping[str, Any]) -> int | None:
    """The number of positions: patches of an image and the class token; None if a size in the config is not valid."""
    side, patch = config.get("image_size"), config.get("patch_size")
    return 1 + (side // patch) ** 2 if type(side) is int and type(patch) is int and patch > 0 else None


def _form(name: str) -> Any:
    """Make a function from a config to the field `name` of the config's `Form`."""
    return lambda config: getattr(FORMS[config["architecture"]], name)


_HIDDEN = "hidden_size hidden_size"
_GATE = "intermediate_size hidden_size"
_OUTER = (
    "cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias",
    *(f"{norm}.{kind}" for norm in ("norm", "fc_norm") for kind in ("weight", "bias")),
)  # fmt: skip
_SEPARATE = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc1_g", "mlp.fc1_x")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _norm(name: str, size: str = "hidden_size") -> dict[str, str]:
    """The weight and the bias of a norm, each with its size."""
    return {f"{name}.weight": size, f"{name}.bias": size}


TIMM = Architecture(
    model_type="timm_wrapper",
    class_name="TimmWrapperModel",
    blocks="blocks",
    module_blocks="timm_model.blocks",
    embeddings={
        "cls_token": "1 1 hidden_size",
        "pos_embed": "1 positions hidden_size",
        "patch_embed.proj.weight": "hidden_size 3 patch_size patch_size",
        "patch_embed.proj.bias": "hidden_size",
    },
    final=_norm("norm") | _norm("fc_norm"),
    head="",
    linears={
        "attn.qkv": "3*hidden_size hidden_size",
        "attn.q_proj": _HIDDEN,
        "attn.k_proj": _HIDDEN,
        "attn.v_proj": _HIDDEN,
        "attn.proj": _HIDDEN,
        "mlp.fc1": "gates*intermediate_size hidden_size",
        "mlp.fc1_g": _GATE,
        "mlp.fc1_x": _GATE,
        "mlp.fc2": "hidden_size intermediate_size",
    },
    norms=_norm("norm1")
    | _norm("norm2")
    | _norm("mlp.norm", "intermediate_size")
    | {"attn.q_bias": "hidden_size", "attn.v_bias": "hidden_size"},
    only_if={
        **dict.fromkeys((f"{path}.weight" for path in _SEPARATE), "separate"),
        **dict.fromkeys(("attn.qkv.weight", "mlp.fc1.weight"), "!separate"),
        **dict.fromkeys(("attn.q_bias", "attn.v_bias"), "!separate !whole_bias"),
        **dict.fromkeys(_norm("mlp.norm"), "separate"),
        **dict.fromkeys(_norm("norm"), "!pooled_norm"),
        **dict.fromkeys(_norm("fc_norm"), "pooled_norm"),
    },
    biases={
        "": ("attn.proj", "mlp.fc2"),
        "!separate": ("mlp.fc1",),
        "whole_bias": ("attn.qkv",),
        "separate": ("attn.q_proj", "attn.v_proj", "mlp.fc1_g", "mlp.fc1_x"),
    },
    bypassed={"attn.qkv": "!separate !whole_bias"},  # timm takes its weight and adds the biases without calling it
    attention_out="attn.proj",
    mlp_out="mlp.fc2",
    count_keys=("num_hidden_layers",),
    config_keys=_words(
        "architectures model_type dtype torch_dtype architecture model_args do_pooling hidden_size num_hidden_layers "
        "num_attention_heads intermediate_size image_size patch_size positions separate gates whole_bias pooled_norm "
        "num_classes"
    ),
    fixed_settings={"num_classes": 0},  # an encoder has none; transformers cannot read a config without the key
    among={"architecture": FORMS},
    follows={
        **{name: _form(name) for name in ("separate", "gates", "whole_bias", "pooled_norm")},
        "positions": _positions,
        "do_pooling": lambda config: True,
        "model_args": model_args,
    },
    modules={name: f"timm_model.{name}" for name in _OUTER},
    vision=Vision(
        "TimmWrapperForImageClassification",
        "timm_model",
        ("pooled",),
        stays=("head.", "rope."),
        head="timm_model.head",
        label_list="label_names",
        extra="timm",
    ),
)
