"""Makes a tiny base model with random weights for any family, offline, to check a recipe before it runs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offsite.errors import IncompatibleError
from offsite.extras import require
from offsite.model_owner.base_model import open_base
from offsite.models.families.architectures import ARCHITECTURES
from offsite.models.hugging_face_calls import quiet
from offsite.protocol.artifacts import Base
from offsite.storage.files import staged_folder

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
# Values for the size keys of all families; a family takes the keys that it has. The head sizes are consistent.
_SIZES: Mapping[str, Any] = {
    "hidden_size": 32, "n_embd": 32, "intermediate_size": 48, "ffn_dim": 48, "word_embed_proj_dim": 32,
    "num_attention_heads": 4, "n_head": 4, "num_key_value_heads": 2, "num_kv_heads": 4, "head_dim": 8,
    "query_pre_attn_scalar": 8, "rotary_dim": 4, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip
_SPREAD = {"initializer_range": 0.15, "init_std": 0.15}  # far enough from zero that logits differ
_SIDE, _PATCH = 16, 4  # pixels of an encoder's picture, and of a patch
_SIZES_AND_DTYPES = frozenset({"n_inner", "ffn_hidden_size", "dtype", "torch_dtype", "architectures", "vocab_size"})


def tiny_base(folder: Path, architecture: str, blocks: int | None = None, *, like: Path | None = None) -> Base:
    """Make a base folder with random weights, hidden size 32, and a byte-level tokenizer or an image processor.

    Args:
        folder: the folder to write; it must not exist, or be empty.
        architecture: a model type of the table of families.
        blocks: the number of blocks; None means that of `like`, or 6.
        like: a base folder from which switches are copied (biases, windows, tied head, ...), but not the sizes.

    Raises:
        IncompatibleError: the family is unknown, or transformers cannot make such a small model of it.
        StorageError: the folder cannot be written.
    """
    family = ARCHITECTURES.get(architecture)
    if family is None:
        raise IncompatibleError(
            f"there is no model of type {architecture[:64]!r}",
            next_step=f"name one of {', '.join(sorted(ARCHITECTURES))}",
        )
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    settings = _variant_settings(family.config_keys, like)
    count = blocks or (family.block_count(settings) if like else 6)
    with staged_folder(folder) as staging, quiet(), torch.random.fork_rng(devices=[]):
        inputs = _tokenizer(staging) if family.vision is None else _processor(staging)
        settings |= {key: size for key, size in {**_SIZES, **_SPREAD}.items() if key in family.config_keys}
        settings |= {family.count_keys[0]: count, **inputs}
        for key in (*family.per_block, *family.count_keys[1:]):
            settings.pop(key, None)  # so that transformers derives lists for the new number of blocks
        settings |= {key: settings.get(key, next(iter(values))) for key, values in family.among.items()}
        settings |= {**family.fixed_settings, **family.computed_settings(settings)} if family.follows else {}
        torch.manual_seed(0)
        auto = AutoModelForCausalLM if family.vision is None else AutoModel
        try:
            auto.from_config(AutoConfig.for_model(architecture, **settings)).save_pretrained(staging)
        except (ValueError, TypeError, RuntimeError, KeyError, ImportError) as error:
            raise IncompatibleError(
                f"transformers makes no tiny {architecture} model",
                reasons=[f"{type(error).__name__}: {error}"],
                next_step="name a base of that type with --base, and leave --check out",
            ) from error
        open_base(Base(staging))
    return Base(folder)


def _variant_settings(config_keys: frozenset[str], like: Path | None) -> dict[str, Any]:
    """The settings that choose a variant of the family (biases, windows and so on), from the config of the base `like`.

    They are the config's keys in `config_keys`, without its type, sizes and dtypes. {} if `like` is None.
    """
    if like is None:
        return {}
    config = json.loads((like / "config.json").read_text(encoding="utf-8"))
    return {key: value for key, value in config.items() if key in config_keys - _SIZES_AND_DTYPES - {"model_type"}}


def _processor(folder: Path) -> dict[str, int]:
    """Save an image processor into a folder; returns the model config's settings for the size of pictures."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    require("PIL.Image", "vision", "reading pictures")
    ViTImageProcessorPil(size={"height": _SIDE, "width": _SIDE}).save_pretrained(folder)
    return {"image_size": _SIDE, "patch_size": _PATCH}


def _tokenizer(folder: Path) -> dict[str, int]:
    """Save a byte-level tokenizer into a folder; returns the model config's settings for vocabulary and tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = [PAD, BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.add_special_tokens([PAD, BOS, EOS])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return {"vocab_size": len(alphabet), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
