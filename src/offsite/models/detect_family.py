"""Derives the row of a model family that is not in the table, from the model that transformers builds for a config.

The row is printed, not used. The receiving party verifies a bundle by its own table, so it would refuse a bundle of a
family that only the sender has (docs/decisions/0008-unknown-families-are-refused.md).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from offsite.errors import IncompatibleError
from offsite.models.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# Keys that every config of transformers has and that no model computes with.
_IDLE = {
    "transformers_version", "architectures", "output_hidden_states", "return_dict", "chunk_size_feed_forward",
    "is_encoder_decoder", "id2label", "label2id", "problem_type", "output_attentions", "auto_map",
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """The facts about a family that can be found without running a model.

    `sizes` has the sizes of every tensor outside the blocks and in the first block, by name.
    """

    model_type: str
    class_name: str
    blocks: str
    embeddings: Sequence[str]
    final: Sequence[str]
    head: str
    tied: bool
    linears: Sequence[str]
    biased: Sequence[str]
    norms: Sequence[str]
    attention_out: str
    mlp_out: str
    transposed: bool
    sizes: Mapping[str, str]
    count_keys: Sequence[str]
    config_keys: Sequence[str]
    per_block: Sequence[str]


def unknown_family(config: Mapping[str, Any]) -> IncompatibleError:
    """The error for an unknown model type, with the row to add to the table, or the reason why none can be derived."""
    what = f"models of type {str(config.get('model_type'))[:64]!r} are not supported"
    supported = f"supported: {', '.join(sorted(ARCHITECTURES))}"
    from offsite.models.hugging_face_calls import LIBRARY_ERRORS

    try:
        row = render(detect(config))
    except IncompatibleError as error:
        return IncompatibleError(
            what, reasons=[supported, error.what, *error.reasons], next_step="use a model of a supported type"
        )
    except LIBRARY_ERRORS as error:  # a model with an unusual structure
        reason = f"its parts could not be told: {type(error).__name__}: {str(error).strip()[:200]}"
        return IncompatibleError(what, reasons=[supported, reason], next_step="use a model of a supported type")
    return IncompatibleError(
        what,
        reasons=[supported, f"the row that it would need:\n{row}"],
        next_step="add that row to offsite/models/families.py as docs/models.md says, at both parties",
    )


def detect(config: Mapping[str, Any]) -> Family:
    """Find the parts of the model that transformers builds for a config; no weights are read or allocated.

    Raises:
        IncompatibleError: transformers has no such model, or its blocks are not one list of blocks of the same shape.
    """
    model = _empty(config)
    whole = model.config.to_dict()
    count = model.config.num_hidden_layers
    path, blocks = _list_of_blocks(model, count)
    first = blocks[0]
    paths = {name: tuple(tensor.shape) for name, tensor in first.state_dict().items()}
    for index, block in enumerate(blocks):
        if {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()} != paths:
            raise IncompatibleError(f"its blocks are not alike: block {index} holds other tensors than block 0")
    stacked = [name for name, shape in paths.items() if len(shape) > 2]
    if stacked:
        raise IncompatibleError(
            f"its blocks hold more than matrices, such as {stacked[0]}",
            reasons=["stacked experts and convolutions are not supported"],
        )
    linears, transposed = _linears(first)
    outer = {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if not name.startswith(f"{path}.")
    }
    head = _name_of(model, model.get_output_embeddings())
    order = list(model.state_dict())
    start = min(index for index, name in enumerate(order) if name.startswith(f"{path}."))
    embedding = _name_of(model, model.get_input_embeddings())
    # modules are listed in the order of the computation, except that the embedding may be listed later
    before = [name for name in outer if name != head and (order.index(name) < start or name == embedding)]
    attention_out, mlp_out = _outputs(linears, paths, transposed)
    return Family(
        model_type=str(config["model_type"]),
        class_name=type(model).__name__,
        blocks=path,
        embeddings=before,
        final=[name for name in outer if name not in (*before, head)],
        head=head,
        tied=bool(type(model.config)().tie_word_embeddings),
        linears=linears,
        biased=[linear for linear in linears if f"{linear}.bias" in paths],
        norms=[name for name in paths if name.rpartition(".")[0] not in linears],
        attention_out=attention_out,
        mlp_out=mlp_out,
        transposed=transposed,
        sizes={name: _sizes(shape, whole) for name, shape in {**outer, **paths}.items()},
        count_keys=[key for key in _COUNTS if whole.get(key) == count],
        config_keys=sorted(key for key in whole if key not in _IDLE and not key.startswith("_")),
        per_block=sorted(key for key, value in whole.items() if isinstance(value, list) and len(value) == count),
    )


def _empty(config: Mapping[str, Any]) -> "PreTrainedModel":
    from transformers import AutoConfig, AutoModelForCausalLM

    from offsite.models.empty_weights import without_weights
    from offsite.models.hugging_face_calls import LIBRARY_ERRORS, quiet

    settings = {key: value for key, value in config.items() if key != "auto_map"}
    try:
        with quiet(), without_weights(buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    except (*LIBRARY_ERRORS, AssertionError) as error:
        reason = str(error).strip()[:200]
        raise IncompatibleError("transformers makes no causal language model of its config", reasons=[reason]) from None
    return model


def _list_of_blocks(model: "PreTrainedModel", count: int) -> "tuple[str, nn.ModuleList]":
    from torch import nn

    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(found) != 1:
        raise IncompatibleError(f"it has {len(found)} lists as long as its block count of {count}, expected one")
    return found[0]


def _linears(block: "nn.Module") -> tuple[list[str], bool]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    found = {name: isinstance(module, Conv1D) for name, module in block.named_modules()
             if isinstance(module, nn.Linear | Conv1D)}  # fmt: skip
    if len(set(found.values())) != 1:
        raise IncompatibleError(
            "its blocks hold no linear layers, or some that store their weights the other way round"
        )
    return list(found), next(iter(found.values()))


def _name_of(model: "PreTrainedModel", module: "nn.Module") -> str:
    names = [f"{name}.weight" for name, candidate in model.named_modules() if candidate is module]
    if not names or names[0] not in model.state_dict():
        raise IncompatibleError("its embedding or head is no single matrix")
    return names[0]


def _outputs(linears: Sequence[str], paths: Mapping[str, Sequence[int]], transposed: bool) -> tuple[str, str]:
    """The paths of the last linear layers of attention and MLP, which have H outputs; guessed from usual names."""
    inputs = {name: paths[f"{name}.weight"][0 if transposed else 1] for name in linears}
    outputs = {name: paths[f"{name}.weight"][1 if transposed else 0] for name in linears}
    hidden = inputs[linears[0]] if "attn" in linears[0] or "attention" in linears[0] else outputs[linears[-1]]
    attention = [name for name in linears if "attn" in name or "attention" in name]
    ends = [name for name in attention if outputs[name] == hidden]
    others = [name for name in linears if name not in attention and outputs[name] == hidden]
    if not ends or not others:
        raise IncompatibleError("its blocks have no attention and MLP that end in the hidden size")
    return ends[-1], others[-1]


def _sizes(shape: Sequence[int], config: Mapping[str, Any]) -> str:
    """The shape as text, such as "vocab_size any": for each size the only config key with that value, or "any"."""
    names = []
    for size in shape:
        keys = [key for key, value in config.items() if type(value) is int and value == size and size > 1]
        names.append(keys[0] if len(keys) == 1 else "any")
    return " ".join(names)


def render(family: Family) -> str:
    """Write the family's row as Python source, which a user can paste into offsite/models/families.py."""

    def table(names: Sequence[str], suffix: str = "") -> str:
        return "{" + ", ".join(f'"{name}": "{family.sizes[name + suffix]}"' for name in names) + "}"

    def listed(names: Sequence[str]) -> str:
        return "(" + "".join(f'"{name}", ' for name in names).rstrip() + ")"

    lists = [f"    # {key} has an entry per block: give the rule by which transformers derives it in per_block"
             for key in family.per_block]  # fmt: skip
    return "\n".join(
        [
            "Architecture(",
            f'    model_type="{family.model_type}",',
            f'    class_name="{family.class_name}",',
            f'    blocks="{family.blocks}",',
            f"    embeddings={table(family.embeddings)},",
            f"    final={table(family.final)},",
            f'    head="{family.head}",',
            f'    head_size="{family.sizes[family.head]}",',
            f"    tied_by_default={family.tied},",
            f"    linears={table(family.linears, '.weight')},",
            f"    norms={table(family.norms)},",
            f'    biases={{"": {listed(family.biased)}}},' if family.biased else "    biases={},",
            f'    attention_out="{family.attention_out}",',
            f'    mlp_out="{family.mlp_out}",',
            f"    transposed={family.transposed},",
            "    linear_residual=False,  # True once you know that nothing but an addition follows mlp_out",
            *lists,
            f"    count_keys={listed(family.count_keys)},",
            f'    config_keys=_COMMON | _words("{" ".join(family.config_keys)}"),',
            ")",
        ]
    )
