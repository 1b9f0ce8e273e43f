"""Derives a model family from the model that transformers builds for a config, for a type that is not in the table.

No weight is read or allocated: the model is built on the meta device. The model owner tests the result with the base's
own weights before anything is shipped (`offsite.model_owner.prove_family`).
"""

import inspect
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from offsite.errors import IncompatibleError, OffsiteError
from offsite.models.families.cut_config import block_counts, cut_config, per_block_keys, structure_of
from offsite.models.families.declared_family import sizes
from offsite.models.families.family import Architecture
from offsite.models.families.layouts import Layout
from offsite.models.families.transformers_types import causal_class, config_keys
from offsite.models.stored_names import StoredNames, map_stored_names

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_NEXT = "use a model of another type; docs/models.md lists those that work"
_MLP = re.compile(r"(shared_)?(mlp|ffn|ff|fc|feed_forward|lin|output|dense|moe|block_sparse_moe)\d?(\.|_|$)")
_OUTPUT = re.compile(
    r"\.?(o_proj|out\w*|c_proj|down\w*|dense|fc2|w2|w_out|wo|output|lin2|layer_2|dense_4h_to_h|\w+_out)$"
)
_ROUTED = ("experts", "router")  # in the names of modules that choose experts, or hold them


@dataclass(frozen=True)
class Derived:
    """A family that was derived from one model, and that model's config with all values that its class derives."""

    family: Architecture
    config: Mapping[str, Any]


def derive_family(config: Mapping[str, Any], stored: Collection[str] = ()) -> Derived:
    """Derive a model family from the model that transformers builds for a config.

    Args:
        config: the content of the base's config.json.
        stored: the names of the tensors in the base's files; if empty, they are taken to be the parameter names of
            transformers' model.

    Raises:
        IncompatibleError: transformers has no such causal language model, or its parts cannot be identified.
    """
    kind = str(config.get("model_type"))[:64]
    causal = causal_class(kind) is not None
    if isinstance(config.get("text_config"), dict) or (causal and "text_config" in config_keys(kind)):
        raise IncompatibleError(
            f"models of type {kind!r} are not supported",
            reasons=[
                "it is a language model within another one",
                "`offsite import` takes the language model out of such a checkpoint",
            ],
            next_step="take the language model out with `offsite import MODEL --out base/`, and name that base",
        )
    if not causal:
        from transformers import __version__

        raise _unsupported(
            kind, [f"transformers {__version__} has no causal language model of that type, and the table no row"]
        )
    try:
        return _derive(config, stored)
    except IncompatibleError as error:
        raise _unsupported(kind, [error.what, *error.reasons]) from None
    except OffsiteError:
        raise
    except Exception as error:  # what a library raises on a config has no end
        reason = f"its parts could not be identified: {type(error).__name__}: {str(error).strip()[:200]}"
        raise _unsupported(kind, [reason]) from error


def _unsupported(kind: str, reasons: Sequence[str]) -> IncompatibleError:
    return IncompatibleError(f"models of type {kind!r} are not supported", reasons=reasons, next_step=_NEXT)


def _derive(config: Mapping[str, Any], stored: Collection[str]) -> Derived:
    """As `derive_family`, for a model type that transformers has; exceptions of libraries are not converted."""
    model = build_empty(config)
    full = _full_config(model)
    path, found = list_of_blocks(model)
    blocks: Sequence[nn.Module] = list(found)
    count = len(blocks)
    names = map_stored_names(model, path, stored)
    state = dict(model.state_dict())
    tied = _is_tied(model)
    full["tie_word_embeddings"] = tied
    counts = block_counts(full, count)
    if not counts and not per_block_keys(full, count):
        raise IncompatibleError(f"no config key holds its number of blocks, {count}")
    layouts, layout_of = _layouts(blocks, hidden_size(model), names)
    head = _name_of(model, model.get_output_embeddings())
    pairs = {name: other for name, other in _tied_pairs(model).items() if name != head}
    inside = [name for pair in pairs.items() for name in pair if name.startswith(f"{path}.")]
    if inside:
        raise IncompatibleError(f"{inside[0]} is one tensor with another")
    before, after = _outer(model, path, head, {name: one for name, one in state.items() if name not in pairs})
    structures = [structure_of(block, index) for index, block in enumerate(blocks)]

    @cache
    def cut(kept: tuple[int, ...]) -> Mapping[str, Any]:
        """The config for a model with only these blocks."""

        def built(settings: Mapping[str, Any]) -> Sequence["nn.Module"]:
            """The blocks of a model with this config, on the meta device."""
            return list(list_of_blocks(build_empty(settings), path)[1])

        return cut_config(full, kept, count, [structures[index] for index in kept], built)

    first = next((one for one in layouts if one.outputs), layouts[0])
    family = Architecture(
        model_type=str(config["model_type"]),
        class_name=type(model).__name__,
        blocks=path,
        embeddings={name: sizes(tuple(state[name].shape)) for name in before},
        final={name: sizes(tuple(state[name].shape)) for name in after},
        head=head,
        head_size=sizes(tuple(state[head].shape)),
        linears={linear: sizes(one.shapes[f"{linear}.weight"]) for one in layouts for linear in one.linears},
        norms={},
        attention_out=first.attention_out,
        mlp_out=first.mlp_out,
        count_keys=counts,
        config_keys=config_keys(str(config["model_type"])),
        tied_by_default=tied,
        transposed=_is_transposed(blocks),
        linear_residual=False,  # until it is proved
        runs_by_block=False,
        per_block=dict.fromkeys(per_block_keys(full, count), _never_derived),
        experts=names.experts,
        layouts=layouts,
        layout_of=layout_of,
        stored_names={name: None if today in pairs else today for name, today in names.today.items()},
        cut=lambda kept: cut(tuple(kept)),
    )
    return Derived(family, full)


def _never_derived(config: Mapping[str, Any], index: int) -> Any:
    """Placeholder rule of a per-block config list: a derived family shortens its config by `cut` instead."""
    raise KeyError(index)


def build_empty(config: Mapping[str, Any]) -> "PreTrainedModel":
    """Build the causal language model of a config on the meta device, without weights.

    Raises:
        IncompatibleError: transformers cannot build it.
    """
    from transformers import AutoModelForCausalLM

    from offsite.models.empty_weights import without_weights
    from offsite.models.hugging_face_calls import quiet
    from offsite.models.loading import attention_of
    from offsite.models.tokenizers import make_config

    settings = {key: value for key, value in config.items() if key != "auto_map"}
    try:
        with quiet(), without_weights(buffers=False):
            made = make_config(settings)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(made, attn_implementation=attention_of(made))
    except Exception as error:  # what a library raises on a config has no end
        reason = f"{type(error).__name__}: {str(error).strip()[:200]}"
        raise IncompatibleError(
            "transformers makes no causal language model of its config", reasons=[reason]
        ) from error
    return model


def _full_config(model: "PreTrainedModel") -> dict[str, Any]:
    """A model's config as JSON: the keys that a bundle may contain, including values that its class derives."""
    whole, usual = model.config.to_dict(), type(model.config)().to_dict()
    kept = {key: value for key, value in whole.items() if key in config_keys(model.config.model_type)}
    plain = {key: _as_json(value) for key, value in kept.items()}
    return {key: value for key, value in plain.items() if _is_json(value) or usual.get(key) != kept[key]}


def _as_json(value: Any) -> Any:
    """Convert a config value to JSON as transformers does: a tuple to a list, infinity to {"__float__": "Infinity"}."""
    if isinstance(value, dict):  # a config within this one says the same by its place
        return {str(key): _as_json(one) for key, one in value.items() if key != "model_type"}
    if isinstance(value, float) and math.isinf(value):
        return {"__float__": "Infinity" if value > 0 else "-Infinity"}
    return [_as_json(one) for one in value] if isinstance(value, list | tuple) else value


def _is_json(value: Any) -> bool:
    """Whether a value consists of JSON types, without infinity."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(one) for key, one in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    return value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and abs(value) < 1e300)


def list_of_blocks(model: "PreTrainedModel", path: str | None = None) -> tuple[str, "nn.ModuleList"]:
    """The list of transformer blocks of a model, after its path: the `nn.ModuleList` with the most parameters.

    Args:
        model: a model.
        path: the path of the list; None: it is not known, and the list is searched for.

    Raises:
        IncompatibleError: the model has no such list.
    """
    from torch import nn

    lists = [(name, one) for name, one in model.named_modules() if isinstance(one, nn.ModuleList) and len(one)]
    if path is not None:
        lists = [(name, one) for name, one in lists if name == path]
    if not lists:
        raise IncompatibleError("it has no list of blocks")
    return max(lists, key=lambda one: sum(parameter.numel() for parameter in one[1].parameters()))


def hidden_size(model: "PreTrainedModel") -> int:
    """The width of the hidden states between a model's blocks."""
    found = getattr(model.config, "hidden_size", None)
    return found if type(found) is int else int(model.get_input_embeddings().weight.shape[1])


def _layouts(
    blocks: Sequence["nn.Module"], hidden: int, names: StoredNames
) -> tuple[tuple[Layout, ...], tuple[int, ...]]:
    """The distinct kinds of blocks, and for each block the index of its kind."""
    kinds: list[Layout] = []
    layout_of = []
    for index, block in enumerate(blocks):
        layout = _layout(block, index, hidden, names)
        if layout not in kinds:
            kinds.append(layout)
        layout_of.append(kinds.index(layout))
    return tuple(kinds), tuple(layout_of)


def _layout(block: "nn.Module", index: int, hidden: int, names: StoredNames) -> Layout:
    """The kind of one block: the shapes of its tensors, and the linear layers that LoRA and bottlenecks may use."""
    state = {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()}
    parameters = {name for name, _ in block.named_parameters()}
    linears = linear_layers(block)
    attention_out, mlp_out = _output_layers(linears, hidden)
    shapes, experts = names.in_files(state, index)
    routed = [name for name in shapes if any(part in name.split(".") for part in _ROUTED) or "*" in name]
    mixed = {name.split(".")[0] for name in routed}  # modules of the block with experts in them
    return Layout(
        shapes=shapes,
        linears=tuple(
            name for name in linears if name.split(".")[0] not in mixed and not _is_read_by_its_parent(block, name)
        ),
        attention_out=attention_out if attention_out.split(".")[0] not in mixed else "",
        mlp_out=mlp_out if mlp_out.split(".")[0] not in mixed else "",
        buffers=frozenset(name for name in shapes if name in state and name not in parameters),
        experts=experts,
    )


def _is_read_by_its_parent(block: "nn.Module", path: str) -> bool:
    """Whether a layer's parent module reads the layer's weight without calling the layer, so LoRA has no effect.

    `path` is the layer's path in the block.
    """
    parent, _, leaf = path.rpartition(".")
    try:
        source = inspect.getsource(type(block.get_submodule(parent)))
    except (OSError, TypeError):  # a class without a source file
        return False
    return re.search(rf"self\.{leaf}\.weight(?!\.(device|dtype))", source) is not None


def linear_layers(block: "nn.Module") -> dict[str, tuple[int, int]]:
    """The linear layers of a block by path, with their numbers of inputs and outputs."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return {
        name: (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


def _is_transposed(blocks: Sequence["nn.Module"]) -> bool:
    """Whether the blocks' linear layers store weights as (inputs, outputs); IncompatibleError if only some do."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    found = {
        isinstance(module, Conv1D)
        for block in blocks
        for module in block.modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    if len(found) > 1:
        raise IncompatibleError("its blocks hold linear layers that store their weights in two ways")
    return found == {True}


def _output_layers(linears: Mapping[str, tuple[int, int]], hidden: int) -> tuple[str, str]:
    """The last linear layers of attention (or of what replaces it) and of the MLP; "" if there is none.

    Both have `hidden` outputs. If a part has several such layers, it is the last whose name is typical of output
    layers, else the last.
    """
    ends: dict[str, str] = {}
    for name, (_, outputs) in linears.items():
        if outputs == hidden:
            start = "mlp" if _MLP.match(name) else name.partition(".")[0]
            if start not in ends or _OUTPUT.search(name) or not _OUTPUT.search(ends[start]):
                ends[start] = name
    mlp = ends.pop("mlp", "")
    return next(iter(ends.values()), ""), mlp


def _outer(
    model: "PreTrainedModel", path: str, head: str, state: Mapping[str, Any]
) -> tuple[Sequence[str], Sequence[str]]:
    """The names of the tensors before the blocks, input embedding first, and of those after the blocks.

    Args:
        model: the model.
        path: the path of its list of blocks.
        head: the name of the head's weight, which is left out.
        state: all tensors of the model by name, in the order of its modules.
    """
    order = list(state)  # without those that are one with another
    outside = [name for name in order if not name.startswith(f"{path}.") and name != head]
    embedding = _name_of(model, model.get_input_embeddings())
    start = min(index for index, name in enumerate(order) if name.startswith(f"{path}."))
    # modules stand in the order of the computation but for those that follow the embedding out of place
    before = [name for name in outside if name != embedding and order.index(name) < start]
    return [embedding, *before], [name for name in outside if name not in before and name != embedding]


def _name_of(model: "PreTrainedModel", module: "nn.Module | None") -> str:
    """The name of the weight of an embedding or head; IncompatibleError if it is not a single matrix."""
    names = [f"{name}.weight" for name, candidate in model.named_modules() if candidate is module]
    if not names or names[0] not in model.state_dict():
        raise IncompatibleError("its embedding or head is no single matrix")
    return names[0]


def _is_tied(model: "PreTrainedModel") -> bool:
    """Whether the head and the input embedding are the same tensor."""
    return _name_of(model, model.get_output_embeddings()) in _tied_pairs(model)


def _tied_pairs(model: "PreTrainedModel") -> dict[str, str]:
    """The tensors that files leave out because they equal another one: their name -> the name of the other."""
    return dict(model.all_tied_weights_keys) if getattr(model.config, "tie_word_embeddings", False) else {}
