"""The table of the families of vision encoders, one entry for each; their bundles contain no head. Torch-free.

Files of most families use the tensor names from the models' first publication. The torch modules have other names; the
field `modules` maps between them.
"""

from collections.abc import Mapping
from typing import Any

from offsite.models.families.family import Architecture, Vision


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _norm(name: str) -> dict[str, str]:
    """The weight and the bias of a norm, each with its size."""
    return {f"{name}.weight": "hidden_size", f"{name}.bias": "hidden_size"}


def _both(paths: Mapping[str, str]) -> dict[str, str]:
    """Map the names of linear layers' weights and biases in files to those in the torch model.

    `paths` maps the paths of the layers in the same way.
    """
    return {f"{path}.{kind}": f"{module}.{kind}" for path, module in paths.items() for kind in ("weight", "bias")}


_KEYS = _words(
    "architectures model_type dtype torch_dtype hidden_size num_hidden_layers num_attention_heads intermediate_size "
    "hidden_act layer_norm_eps initializer_range image_size patch_size num_channels"
)
_DROPOUTS = _words("hidden_dropout_prob attention_probs_dropout_prob")
_HIDDEN = "hidden_size hidden_size"
_QKV = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
_ATTENTION = {**dict.fromkeys(_QKV, _HIDDEN), "attention.output.dense": _HIDDEN}
_ATTENTION_MODULES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
_PATCHES = {
    "embeddings.patch_embeddings.projection.weight": "hidden_size num_channels patch_size patch_size",
    "embeddings.patch_embeddings.projection.bias": "hidden_size",
}
_CLASS = {"embeddings.cls_token": "1 1 hidden_size"}
_POSITIONS = {"embeddings.position_embeddings": "1 any hidden_size"}
_POOLER = ("pooler.", "classifier.", "cls_classifier.", "distillation_classifier.", "embeddings.mask_token", "decoder.")


def _vit_like(model_type: str, class_name: str, vision: Vision, **columns: Any) -> Architecture:
    """A family with ViT's tensor names; `columns` are the fields of `Architecture` that differ from ViT's."""
    usual: dict[str, Any] = {
        "embeddings": _CLASS | _POSITIONS | _PATCHES,
        "final": _norm("layernorm"),
        "norms": _norm("layernorm_before") | _norm("layernorm_after"),
        "biases": {"qkv_bias": _QKV, "": ("attention.output.dense", "intermediate.dense", "output.dense")},
        "defaults": {"qkv_bias": True},
        "config_keys": _KEYS | _DROPOUTS | _words("qkv_bias"),
        "modules": _both(_ATTENTION_MODULES | {"intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"}),
    }
    return Architecture(
        model_type=model_type,
        class_name=class_name,
        blocks="encoder.layer",
        module_blocks="layers",
        head="",
        linears={
            **_ATTENTION,
            "intermediate.dense": "intermediate_size hidden_size",
            "output.dense": "hidden_size intermediate_size",
        },
        attention_out="attention.output.dense",
        mlp_out="output.dense",
        count_keys=("num_hidden_layers",),
        vision=vision,
        **(usual | columns),
    )


def _dinov2_like(model_type: str, class_name: str, vision: Vision, **columns: Any) -> Architecture:
    """A family with DINOv2's tensor names; `columns` are the fields of `Architecture` that differ from DINOv2's."""
    return Architecture(
        model_type=model_type,
        class_name=class_name,
        blocks="encoder.layer",
        final=_norm("layernorm"),
        head="",
        linears={
            **_ATTENTION,
            "mlp.fc1": "mlp_ratio*hidden_size hidden_size",
            "mlp.fc2": "hidden_size mlp_ratio*hidden_size",
        },
        norms=_norm("norm1")
        | _norm("norm2")
        | {"layer_scale1.lambda1": "hidden_size", "layer_scale2.lambda1": "hidden_size"},
        biases={"qkv_bias": _QKV, "": ("attention.output.dense", "mlp.fc1", "mlp.fc2")},
        attention_out="attention.output.dense",
        mlp_out="mlp.fc2",
        mlp_scale="layer_scale2.lambda1",
        attention_scale="layer_scale1.lambda1",
        modules=_both(_ATTENTION_MODULES),
        refused={
            "use_swiglu_ffn": "its gated feed-forward is two maps in one matrix, which this row does not describe"
        },
        count_keys=("num_hidden_layers",),
        vision=vision,
        **columns,
    )


_DINOV2_KEYS = _KEYS | _DROPOUTS | _words("qkv_bias mlp_ratio layerscale_value drop_path_rate use_swiglu_ffn")


def _tower(model_type: str, class_name: str, vision: Vision, **columns: Any) -> Architecture:
    """The family of an image tower: the vision encoder of a model for images and texts, such as CLIP.

    `columns` are the fields of `Architecture` that towers do not have in common.
    """
    return Architecture(
        model_type=model_type,
        class_name=class_name,
        blocks="encoder.layers",
        head="",
        linears={
            "self_attn.q_proj": _HIDDEN,
            "self_attn.k_proj": _HIDDEN,
            "self_attn.v_proj": _HIDDEN,
            "self_attn.out_proj": _HIDDEN,
            "mlp.fc1": "intermediate_size hidden_size",
            "mlp.fc2": "hidden_size intermediate_size",
        },
        norms=_norm("layer_norm1") | _norm("layer_norm2"),
        biases={
            "": (
                "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2",
            )
        },
        attention_out="self_attn.out_proj",
        mlp_out="mlp.fc2",
        count_keys=("num_hidden_layers",),
        vision=vision,
        **columns,
    )  # fmt: skip


VISION_FAMILIES = (
    _vit_like(
        "vit",
        "ViTModel",
        Vision("ViTForImageClassification", "vit", ("class",), stays=_POOLER, keywords={"add_pooling_layer": False}),
    ),
    _vit_like(
        "deit",
        "DeiTModel",
        Vision(
            "DeiTForImageClassification",
            "deit",
            ("class",),
            before=("2",),
            stays=_POOLER,
            keywords={"add_pooling_layer": False},
        ),
        embeddings=_CLASS | {"embeddings.distillation_token": "1 1 hidden_size"} | _POSITIONS | _PATCHES,
    ),
    _vit_like(
        "beit",
        "BeitModel",
        # the head reads the pooler's output, so a bundle holds the pooler's norm
        Vision("BeitForImageClassification", "beit", ("pooled",), stays=("classifier.", "lm_head.", "decode_head.")),
        embeddings=_CLASS
        | {"embeddings.mask_token": "1 1 hidden_size"}
        | _POSITIONS
        | _PATCHES
        | {"encoder.relative_position_bias.relative_position_bias_table": "any num_attention_heads"},
        final=_norm("layernorm") | _norm("pooler.layernorm"),
        norms=_norm("layernorm_before")
        | _norm("layernorm_after")
        | {
            "lambda_1": "hidden_size",
            "lambda_2": "hidden_size",
            "attention.attention.relative_position_bias.relative_position_bias_table": "any num_attention_heads",
        },
        only_if={
            "embeddings.mask_token": "use_mask_token",
            "embeddings.position_embeddings": "use_absolute_position_embeddings",
            "encoder.relative_position_bias.relative_position_bias_table": "use_shared_relative_position_bias",
            "attention.attention.relative_position_bias.relative_position_bias_table": "use_relative_position_bias",
            **dict.fromkeys(_norm("layernorm"), "!use_mean_pooling"),
            **dict.fromkeys(_norm("pooler.layernorm"), "use_mean_pooling"),
            **dict.fromkeys(("lambda_1", "lambda_2"), "layer_scale_init_value"),
        },
        biases={
            "": (
                "attention.attention.query",
                "attention.attention.value",
                "attention.output.dense",
                "intermediate.dense",
                "output.dense",
            )
        },
        defaults={"use_mean_pooling": True, "layer_scale_init_value": 0.1},
        config_keys=_KEYS
        | _DROPOUTS
        | _words(
            "use_mask_token use_absolute_position_embeddings use_relative_position_bias drop_path_rate "
            "use_shared_relative_position_bias layer_scale_init_value use_mean_pooling"
        ),
        modules=_both(_ATTENTION_MODULES | {"intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"})
        | {
            "attention.attention.relative_position_bias.relative_position_bias_table": (
                "relative_position_bias.relative_position_bias_table"
            ),
            "encoder.relative_position_bias.relative_position_bias_table": (
                "shared_position_bias.relative_position_bias_table"
            ),
        },
        head_positions="use_relative_position_bias or use_shared_relative_position_bias",
        mlp_scale="lambda_2",
        attention_scale="lambda_1",
    ),
    _dinov2_like(
        "dinov2",
        "Dinov2Model",
        Vision("Dinov2ForImageClassification", "dinov2", ("class", "mean"), stays=("classifier.",), any_size=True),
        embeddings=_CLASS | {"embeddings.mask_token": "1 hidden_size"} | _POSITIONS | _PATCHES,
        only_if={"embeddings.mask_token": "use_mask_token"},
        defaults={"use_mask_token": True, "qkv_bias": True},
        config_keys=_DINOV2_KEYS | _words("use_mask_token"),
    ),
    _dinov2_like(
        "dinov2_with_registers",
        "Dinov2WithRegistersModel",
        Vision(
            "Dinov2WithRegistersForImageClassification",
            "dinov2_with_registers",
            ("class", "mean"),
            before=("1", "num_register_tokens"),
            stays=("classifier.",),
            any_size=True,
        ),
        embeddings=_CLASS
        | {
            "embeddings.mask_token": "1 hidden_size",
            "embeddings.register_tokens": "1 num_register_tokens hidden_size",
        }
        | _POSITIONS
        | _PATCHES,
        only_if={"embeddings.register_tokens": "num_register_tokens"},
        defaults={"num_register_tokens": 4, "qkv_bias": True},
        config_keys=_DINOV2_KEYS | _words("num_register_tokens"),
    ),
    _tower(
        "clip_vision_model",
        "CLIPVisionModel",
        Vision(
            "CLIPForImageClassification",
            "vision_model",
            ("mean",),
            stays=("classifier.", "embeddings.position_ids"),
            tower_of="clip",
        ),
        embeddings={
            "embeddings.class_embedding": "hidden_size",
            "embeddings.patch_embedding.weight": "hidden_size num_channels patch_size patch_size",
            "embeddings.position_embedding.weight": "any hidden_size",
            **_norm("pre_layrnorm"),
        },
        final=_norm("post_layernorm"),
        config_keys=_KEYS | _words("attention_dropout initializer_factor projection_dim"),
    ),
    _tower(
        "siglip_vision_model",
        "SiglipVisionModel",
        Vision(
            "SiglipForImageClassification",
            "vision_model",
            ("mean",),
            before=(),
            stays=("classifier.", "head.", "embeddings.position_ids"),
            keywords={"vision_use_head": False},
            tower_of="siglip",
        ),
        embeddings={
            "embeddings.patch_embedding.weight": "hidden_size num_channels patch_size patch_size",
            "embeddings.patch_embedding.bias": "hidden_size",
            "embeddings.position_embedding.weight": "any hidden_size",
        },
        final=_norm("post_layernorm"),
        fixed_settings={"vision_use_head": False},
        config_keys=_KEYS | _words("attention_dropout vision_use_head"),
    ),
)
