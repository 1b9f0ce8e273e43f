"""The table of model families: where blocks, embeddings, head and linear maps are. Torch-free.

A family is a row here, never a branch elsewhere. Names are those of the tensors in files as transformers writes them
today; `Architecture.name_of` maps the spellings of older published files to them.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offsite.errors import IncompatibleError

_COMMON_KEYS = frozenset(
    {
        "architectures", "model_type", "dtype", "torch_dtype", "vocab_size", "bos_token_id", "eos_token_id",
        "pad_token_id", "tie_word_embeddings", "use_cache", "initializer_range",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One family of decoder language models."""

    model_type: str
    class_name: str
    blocks: str  # path of the list of blocks
    embeddings: tuple[str, ...]  # tensors before the blocks
    final: tuple[str, ...]  # tensors after the blocks, before the head
    head: str
    tied_by_default: bool  # whether the head is the input embedding where the config does not say
    linears: tuple[str, ...]  # paths in a block of the linear maps: where LoRA sits
    norms: tuple[str, ...]  # tensors of a block beside its linear maps
    biases: Mapping[
        str, tuple[str, ...]
    ]  # config key ("" for always) -> tensors of a block that are there if it is set
    shapes: Mapping[str, str]  # name (path, in a block) -> sizes as products of numbers and config keys
    attention_out: str
    mlp_out: str
    transposed: bool  # linear maps store their weights (in, out): GPT-2's Conv1D
    linear_residual: bool  # a block's output is linear in what attention_out and mlp_out give: what refit solves for
    count_keys: tuple[str, ...]  # config keys that hold the number of blocks, the one transformers reads first
    config_keys: frozenset[str]  # config keys that may travel
    per_block_keys: tuple[str, ...] = ()  # config keys that hold a list with an entry per block
    refused: tuple[str, ...] = ()  # switches that must be off: with them on, a cut changes what blocks do
    prefix: str = ""  # what published files leave out before every name
    buffers: str | None = None  # regular expression of tensors in older files that are no weights

    def name_of(self, stored: str) -> str | None:
        """Today's name of a tensor as stored in a file; None for a buffer that is no weight."""
        name = stored
        if self.prefix and not stored.startswith((self.prefix, self.head)):
            name = self.prefix + stored
        return None if self.buffers and re.fullmatch(self.buffers, name) else name

    def block_of(self, name: str) -> tuple[int, str] | None:
        """The index of the block that a tensor or module belongs to, and its path in the block."""
        match = re.fullmatch(rf"{re.escape(self.blocks)}\.(0|[1-9]\d{{0,4}})\.(.+)", name)
        return (int(match[1]), match[2]) if match else None

    def in_block(self, index: int, path: str) -> str:
        """The full name of a tensor or module of a block."""
        return f"{self.blocks}.{index}.{path}"

    def block_count(self, config: Mapping[str, Any]) -> int:
        """The number of blocks that a config names.

        Raises:
            IncompatibleError: the config names none, or two of its spellings disagree.
        """
        found = {key: config[key] for key in self.count_keys if key in config}
        numbers = {count for count in found.values() if type(count) is int and count > 0}
        if len(numbers) != 1 or any(type(count) is not int or count not in numbers for count in found.values()):
            raise IncompatibleError(
                "the config does not say how many blocks the model has",
                reasons=[f"found {found or 'none'}, expected one number under {' or '.join(self.count_keys)}"],
                next_step="mend config.json in the base folder",
            )
        return numbers.pop()

    def tied(self, config: Mapping[str, Any]) -> bool:
        """Whether the head shares the input embedding's weights."""
        return bool(config.get("tie_word_embeddings", self.tied_by_default))

    def block_tensors(self, config: Mapping[str, Any]) -> frozenset[str]:
        """The paths in a block of all its tensors: exactly these, in every block."""
        biases = {path for key, paths in self.biases.items() if not key or config.get(key) for path in paths}
        return frozenset({*(f"{path}.weight" for path in self.linears), *self.norms, *biases})

    def outer_tensors(self, config: Mapping[str, Any]) -> frozenset[str]:
        """The names of all tensors outside the blocks; a tied head is none."""
        return frozenset({*self.embeddings, *self.final, *(() if self.tied(config) else (self.head,))})

    def shape_problem(self, name: str, shape: Sequence[int], config: Mapping[str, Any]) -> str | None:
        """What is wrong with a tensor's shape by the sizes that the config names; a size that it leaves out is free."""
        place = self.block_of(name)
        rule = self.shapes.get(place[1] if place else name)
        if rule is None:
            return None
        expected = [_size(product, config) for product in rule.split()]
        if len(shape) == len(expected) and all(e in (None, s) for s, e in zip(shape, expected, strict=True)):
            return None
        shown = ", ".join("any" if size is None else str(size) for size in expected)
        return f"{name[:120]!r} has shape {list(shape)}, the config makes it [{shown}]"

    def set_switches(self, config: Mapping[str, Any]) -> dict[str, object]:
        """The refused switches that a config turns on; transformers takes anything that is true for on."""
        return {key: config[key] for key in self.refused if config.get(key)}


def _size(product: str, config: Mapping[str, Any]) -> int | None:
    factors: list[Any] = [int(factor) if factor.isdigit() else config.get(factor) for factor in product.split("*")]
    return int(math.prod(factors)) if all(type(factor) is int for factor in factors) else None


_TABLE = (
    Architecture(
        model_type="llama",
        class_name="LlamaForCausalLM",
        blocks="model.layers",
        embeddings=("model.embed_tokens.weight",),
        final=("model.norm.weight",),
        head="lm_head.weight",
        tied_by_default=False,
        linears=(
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        ),
        norms=("input_layernorm.weight", "post_attention_layernorm.weight"),
        biases={
            "attention_bias": tuple(f"self_attn.{name}_proj.bias" for name in "qkvo"),
            "mlp_bias": ("mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias"),
        },
        shapes={
            "model.embed_tokens.weight": "vocab_size hidden_size",
            "model.norm.weight": "hidden_size",
            "lm_head.weight": "vocab_size hidden_size",
            "input_layernorm.weight": "hidden_size",
            "post_attention_layernorm.weight": "hidden_size",
            "self_attn.q_proj.weight": "num_attention_heads*head_dim hidden_size",
            "self_attn.k_proj.weight": "num_key_value_heads*head_dim hidden_size",
            "self_attn.v_proj.weight": "num_key_value_heads*head_dim hidden_size",
            "self_attn.o_proj.weight": "hidden_size num_attention_heads*head_dim",
            "self_attn.q_proj.bias": "num_attention_heads*head_dim",
            "self_attn.k_proj.bias": "num_key_value_heads*head_dim",
            "self_attn.v_proj.bias": "num_key_value_heads*head_dim",
            "self_attn.o_proj.bias": "hidden_size",
            "mlp.gate_proj.weight": "intermediate_size hidden_size",
            "mlp.up_proj.weight": "intermediate_size hidden_size",
            "mlp.down_proj.weight": "hidden_size intermediate_size",
            "mlp.gate_proj.bias": "intermediate_size",
            "mlp.up_proj.bias": "intermediate_size",
            "mlp.down_proj.bias": "hidden_size",
        },
        attention_out="self_attn.o_proj",
        mlp_out="mlp.down_proj",
        transposed=False,
        linear_residual=True,
        count_keys=("num_hidden_layers",),
        config_keys=_COMMON_KEYS
        | {
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "pretraining_tp", "rope_parameters",
            "rope_theta", "rope_scaling", "attention_bias", "attention_dropout", "mlp_bias",
        },
        buffers=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    ),
    Architecture(
        model_type="gpt2",
        class_name="GPT2LMHeadModel",
        blocks="transformer.h",
        embeddings=("transformer.wte.weight", "transformer.wpe.weight"),
        final=("transformer.ln_f.weight", "transformer.ln_f.bias"),
        head="lm_head.weight",
        tied_by_default=True,
        linears=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        norms=("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"),
        biases={"": ("attn.c_attn.bias", "attn.c_proj.bias", "mlp.c_fc.bias", "mlp.c_proj.bias")},
        shapes={
            "transformer.wte.weight": "vocab_size n_embd",
            "transformer.wpe.weight": "n_positions n_embd",
            "transformer.ln_f.weight": "n_embd",
            "transformer.ln_f.bias": "n_embd",
            "lm_head.weight": "vocab_size n_embd",
            "ln_1.weight": "n_embd",
            "ln_1.bias": "n_embd",
            "ln_2.weight": "n_embd",
            "ln_2.bias": "n_embd",
            "attn.c_attn.weight": "n_embd 3*n_embd",
            "attn.c_attn.bias": "3*n_embd",
            "attn.c_proj.weight": "n_embd n_embd",
            "attn.c_proj.bias": "n_embd",
            "mlp.c_fc.weight": "n_embd n_inner",
            "mlp.c_fc.bias": "n_inner",
            "mlp.c_proj.weight": "n_inner n_embd",
            "mlp.c_proj.bias": "n_embd",
        },
        attention_out="attn.c_proj",
        mlp_out="mlp.c_proj",
        transposed=True,
        linear_residual=True,
        count_keys=("n_layer", "num_hidden_layers"),
        config_keys=_COMMON_KEYS
        | {
            "n_layer", "num_hidden_layers", "n_embd", "n_head", "n_inner", "n_positions", "n_ctx",
            "activation_function", "layer_norm_epsilon", "embd_pdrop", "attn_pdrop", "resid_pdrop",
            "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn",
        },
        refused=("scale_attn_by_inverse_layer_idx",),
        prefix="transformer.",
        buffers=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",
    ),
)  # fmt: skip

ARCHITECTURES: Mapping[str, Architecture] = {row.model_type: row for row in _TABLE}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The row of a config's model type.

    Raises:
        IncompatibleError: no row has that type, or a setting makes blocks depend on where they stand.
    """
    row = ARCHITECTURES.get(str(config.get("model_type")))
    if row is None:
        raise IncompatibleError(
            f"models of type {str(config.get('model_type'))[:64]!r} are not supported",
            reasons=[f"supported: {', '.join(sorted(ARCHITECTURES))}"],
            next_step="add a row to offsite/core/architectures.py; the tests then cover it",
        )
    bad = row.set_switches(config)
    if bad:
        raise IncompatibleError(
            f"this {row.model_type} model's blocks compute by their position, so none can be dropped",
            reasons=[f"config has {key} = {value!r}" for key, value in bad.items()],
            next_step="use a checkpoint without that setting",
        )
    return row


def config_problems(config: Mapping[str, Any], row: Architecture) -> list[str]:
    """What in a config may not travel: unknown keys (code, paths, hub kernels) and values that are no plain setting."""
    problems = [f"config key {key!r} is not permitted" for key in sorted(set(config) - row.config_keys)]
    problems += [
        f"config key {key!r} holds {str(config[key])[:60]!r}, which is no plain setting"
        for key in sorted(set(config) & row.config_keys)
        if not _plain(config[key], depth=3)
    ]
    return problems


_WORD = re.compile(r"[A-Za-z0-9_.+-]{0,64}")


def _plain(value: object, depth: int) -> bool:
    if value is None or isinstance(value, bool | int | float):
        return True
    if isinstance(value, str):
        return _WORD.fullmatch(value) is not None
    if isinstance(value, list) and depth:
        return len(value) <= 4096 and all(_plain(item, depth - 1) for item in value)
    if isinstance(value, dict) and depth:
        return len(value) <= 64 and all(_plain(key, 0) and _plain(item, depth - 1) for key, item in value.items())
    return False
