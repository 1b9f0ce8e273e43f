"""Attention heads, MLP neurons and experts of a block: their numbers, and the parts of tensors that belong to each.

Heads are removed in units. A unit is a key-value head with all query heads that read it; in a block with one key-value
head, it is one query head. An expert has its own matrices and its row of the router. Torch-free.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from offsite.errors import IncompatibleError
from offsite.models.families.family import Architecture

Shapes = Mapping[str, tuple[int, ...]]  # by path in a block
Indices = tuple[int, ...]

_QUERIES, _KEYS = "queries", "keys"  # keys: values too
_STACKED = "stacked"  # all queries, then all keys, then all values
_INTERLEAVED = "interleaved"  # for each key-value head: its queries, its key, its value
# What the outputs of attention's linear layers are, by the last word of the layer's path; also of separate biases.
_OUTPUTS = {
    **dict.fromkeys(("q_proj", "query", "q_bias"), _QUERIES),
    **dict.fromkeys(("k_proj", "v_proj", "key", "value", "v_bias"), _KEYS),
    **dict.fromkeys(("qkv_proj", "c_attn", "qkv"), _STACKED),
    "query_key_value": _INTERLEAVED,
}
_PER_HEAD = re.compile(r"(.+\.([qk])_layernorm\.norms)\.(\d+)(\..+)")  # a norm for each query or key head


@dataclass(frozen=True)
class Widths:
    """The widths of one block: hidden size, and numbers of attention heads, MLP neurons and experts."""

    hidden: int  # size of the hidden state
    heads: int  # query heads
    groups: int  # key-value heads; heads / groups query heads read each
    head_size: int  # size of a head
    neurons: int  # hidden neurons of the MLP; 0 if the block has experts
    grouped: bool  # whether a unit is a key-value head with its query heads, else it is a query head
    experts: int = 0  # of a mixture; 0 if the block has none
    chosen: int = 0  # experts that process a token

    @property
    def units(self) -> int:
        """The number of units in which heads are removed."""
        return self.groups if self.grouped else self.heads

    @property
    def unit_heads(self) -> int:
        """The number of query heads in a unit."""
        return self.heads // self.units

    def narrowed(self, units: int, neurons: int, experts: int | None = None) -> "Widths":
        """A copy with other numbers of units of heads, MLP neurons and experts; `experts` None: all experts."""
        groups = units if self.grouped else self.groups
        experts = self.experts if experts is None else experts
        return replace(self, heads=units * self.unit_heads, groups=groups, neurons=neurons, experts=experts)


@dataclass(frozen=True)
class Kept:
    """The units of heads, the MLP neurons and the experts that remain in a narrowed block.

    They are ascending indices in the base's block.
    """

    units: Indices
    neurons: Indices
    experts: Indices = ()

    @classmethod
    def all_of(cls, widths: Widths) -> "Kept":
        """All units, neurons and experts of a block with these widths."""
        return cls(tuple(range(widths.units)), tuple(range(widths.neurons)), tuple(range(widths.experts)))


def neuron_layers(family: Architecture, paths: Iterable[str]) -> list[str]:
    """The linear layers among `paths` whose outputs are the MLP's neurons: its gate and up projections."""
    outer = {family.attention_out, family.mlp_out}
    return [path for path in paths if path in family.linears and path not in outer and _attention_role(path) is None]


def widths_of(family: Architecture, config: Mapping[str, Any], shapes: Shapes) -> Widths:
    """The widths of a block as the family defines it, without any narrowing.

    Args:
        family: the model's family.
        config: the family's config.
        shapes: the shapes of the block's tensors, by path in the block as in checkpoint files.

    Raises:
        IncompatibleError: the config and the shapes do not say how many heads the block has.
    """
    heads = next((config[key] for key in family.heads_keys if type(config.get(key)) is int and config[key] > 0), 0)
    outputs = {path: _outputs_inputs(family, shapes[f"{path}.weight"])[0] for path in _linears(family, shapes)}
    hidden, inner = _outputs_inputs(family, shapes[f"{family.attention_out}.weight"])
    size = inner // heads if heads else 0
    groups = 0
    for path, rows in outputs.items():
        role = _attention_role(path)
        if role == _KEYS and size:
            groups = rows // size
        elif role in (_STACKED, _INTERLEAVED) and size:
            groups = (rows // size - heads) // 2
    if not groups or heads % groups or size * heads != inner:
        raise IncompatibleError(
            f"the attention heads of this {family.model_type} model cannot be counted",
            reasons=[f"heads {heads}, key-value heads {groups}, inputs of {family.attention_out} {inner}"],
            next_step="correct config.json in the base folder",
        )
    dense = f"{family.mlp_out}.weight"
    neurons = _outputs_inputs(family, shapes[dense])[1] if dense in shapes else 0
    experts = len({expert_number(family, path) for path in shapes} - {None})
    chosen = family.chosen_experts(config) if experts else 0
    return Widths(hidden, heads, groups, size, neurons, grouped=groups > 1, experts=experts, chosen=chosen)


def narrower_widths(family: Architecture, base: Widths, shapes: Shapes) -> Widths:
    """The widths of a narrowed block, computed from the shapes of its tensors.

    Args:
        family: the model's family.
        base: the widths of the block without narrowing.
        shapes: the shapes of the tensors whose shape was changed, by path in the block. If the output projection of
            attention is missing, all heads remain; if that of the MLP is missing, all neurons; if the router, all
            experts.
    """
    units, neurons, experts = base.units, base.neurons, base.experts
    ends = {path: shapes.get(f"{path}.weight") for path in (family.attention_out, family.mlp_out)}
    if (shape := ends[family.attention_out]) is not None:
        units = _outputs_inputs(family, shape)[1] // (base.unit_heads * base.head_size)
    if (shape := ends[family.mlp_out]) is not None:
        neurons = _outputs_inputs(family, shape)[1]
    if (router := router_of(family)) is not None and router in shapes:
        experts = shapes[router][0]
    return base.narrowed(units, neurons, experts)


def obstacles(family: Architecture, config: Mapping[str, Any], paths: Iterable[str]) -> dict[str, str]:
    """Why attention heads, MLP neurons or experts cannot be removed from the blocks of a model.

    Returns a reason under the key "heads", "neurons" or "experts"; empty if all can be removed.

    Args:
        family: the model's family.
        config: the family's config.
        paths: the paths of a block's tensors.
    """
    found = {}
    if family.head_positions and family.holds(family.head_positions, config):
        found["heads"] = "each head has its own bias for positions, by its number"
    sizes = family.linears.get(family.mlp_out, "").split()
    inner = sizes[0 if family.transposed else 1] if sizes else ""
    if family.experts:
        found["neurons"] = "its MLP is a mixture of experts"
    elif any(family.norms.get(path) == inner for path in paths):
        found["neurons"] = "a norm runs over the neurons"
    if family.experts is None:
        found["experts"] = "its blocks have no experts"
    return found


def router_of(family: Architecture) -> str | None:
    """The path in a block of the router's weight, which has a row for each expert; None without experts."""
    if family.experts is None:
        return None
    return next(path for path, sizes in family.norms.items() if sizes.split()[0] == "experts")


def narrowed_shapes(family: Architecture, shapes: Shapes, base: Widths, widths: Widths) -> dict[str, tuple[int, ...]]:
    """The shapes of a block's tensors after units were removed, by path in the narrowed block.

    Args:
        family: the model's family.
        shapes: the shapes of the block's tensors before, by path in the block.
        base: the widths of the block before.
        widths: the widths of the block after.
    """
    kept = Kept.all_of(widths)  # which ones does not matter to a shape
    found = {}
    for path, shape in shapes.items():
        name = _path_in_narrowed(family, path, base, kept)
        if name is not None:
            places = tensor_places(family, path, shape, base, kept)
            found[name] = tuple(
                size if at is None else len(at) for size, at in zip(shape, (*places, None, None), strict=False)
            )
    return found


def narrowed_names(family: Architecture, paths: Iterable[str], base: Widths, kept: Kept) -> dict[str, str]:
    """Map the path of each tensor in a narrowed block to its path in the base's block.

    They differ only for experts and for norms of single heads, which are numbered.
    """
    return {name: path for path in paths if (name := _path_in_narrowed(family, path, base, kept)) is not None}


def tensor_places(
    family: Architecture, path: str, shape: Sequence[int], base: Widths, kept: Kept
) -> tuple[Indices | None, ...]:
    """For each axis of a block's tensor, the indices that remain in the narrowed block; None if all remain.

    Axes are in the order of checkpoint files.

    Args:
        family: the model's family.
        path: the tensor's path in the base's block.
        shape: its shape in the base.
        base: the widths of the base's block.
        kept: the units, neurons and experts that remain.
    """
    if base.experts and path == router_of(family):
        return (kept.experts if len(kept.experts) < base.experts else None, *(None for _ in shape[1:]))
    module, _, kind = path.rpartition(".")
    if kind not in ("weight", "bias") or module not in family.linears:
        rows = _kept_outputs(family, path, shape[0], base, kept) if _attention_role(path) else None
        return (rows, *(None for _ in shape[1:]))
    axis = 1 if family.transposed and kind == "weight" else 0  # of the outputs
    outputs = _kept_outputs(family, module, shape[axis], base, kept)
    if kind == "bias":
        return (outputs,)
    return (_kept_inputs(family, module, base, kept), outputs) if family.transposed else (
        outputs, _kept_inputs(family, module, base, kept)
    )  # fmt: skip


def kept_rows_and_columns(
    family: Architecture, linear: str, shape: Sequence[int], base: Widths, kept: Kept
) -> tuple[Indices | None, Indices | None]:
    """The output indices and the input indices of a linear layer that remain after narrowing; None if all remain.

    Args:
        family: the model's family.
        linear: the layer's path in the block.
        shape: the shape of its weight in the base, as files store it.
        base: the widths of the base's block.
        kept: the units, neurons and experts that remain.
    """
    places = tensor_places(family, f"{linear}.weight", shape, base, kept)
    return (places[1], places[0]) if family.transposed else (places[0], places[1])


def multiply_adds(family: Architecture, shapes: Shapes, chosen: int = 0) -> int:
    """The multiply-adds of a block's linear layers for one token: the sizes of their weights.

    Args:
        family: the model's family.
        shapes: the shapes of the block's tensors, by path in the block.
        chosen: the number of experts that process a token; only these are counted. 0: no experts are counted.
    """
    counted = (path for path in shapes if (number := expert_number(family, path)) is None or number < chosen)
    sizes = (shapes[path] for path in counted if family.is_linear(family.in_block(0, path)))
    return sum(rows * columns for rows, columns in sizes)


def goes_with_a_unit(family: Architecture, path: str) -> bool:
    """Whether the tensor at this path in a block belongs to one expert, or to the norm of one head."""
    return _PER_HEAD.fullmatch(path) is not None or expert_number(family, path) is not None


def expert_number(family: Architecture, path: str) -> int | None:
    """The index of the expert to which the tensor at this path in a block belongs; None for other tensors."""
    if family.experts is None or not path.startswith(f"{family.experts.path}."):
        return None
    number = path.removeprefix(f"{family.experts.path}.").partition(".")[0]
    return int(number) if number.isdecimal() else None


def _linears(family: Architecture, shapes: Shapes) -> list[str]:
    """The paths of the linear layers that have a weight in `shapes`."""
    return [path for path in family.linears if f"{path}.weight" in shapes]


def _outputs_inputs(family: Architecture, shape: Sequence[int]) -> tuple[int, int]:
    """A linear layer's numbers of outputs and inputs, from the shape of its weight in files."""
    return (shape[1], shape[0]) if family.transposed else (shape[0], shape[1])


def _attention_role(path: str) -> str | None:
    """What the outputs of a linear layer (or a bias) are in attention, such as queries; None for other layers."""
    return _OUTPUTS.get(path.rpartition(".")[2])


def _kept_outputs(family: Architecture, path: str, rows: int, base: Widths, kept: Kept) -> Indices | None:
    """The indices of a layer's outputs that remain in the narrowed block; None if all remain.

    `rows` is the number of its outputs in the base.
    """
    if path == family.mlp_out or path == family.attention_out:
        return None
    role = _attention_role(path)
    if role is None:
        if not base.neurons or rows % base.neurons or len(kept.neurons) == base.neurons:
            return None
        return tuple(first + one for first in range(0, rows, base.neurons) for one in kept.neurons)
    if len(kept.units) == base.units:
        return None
    size, width = base.head_size, base.unit_heads * base.head_size
    queries = _spans(kept.units, width)
    keys = _spans(kept.units, size) if base.grouped else tuple(range(size))
    if role == _QUERIES:
        return queries
    if role == _KEYS:
        return keys if base.grouped else None
    if role == _INTERLEAVED and base.grouped:
        return _spans(kept.units, width + 2 * size)
    key, value = base.heads * size, (base.heads + base.groups) * size
    return (*queries, *(key + one for one in keys), *(value + one for one in keys))


def _kept_inputs(family: Architecture, path: str, base: Widths, kept: Kept) -> Indices | None:
    """The indices of a layer's inputs that remain in the narrowed block; None if all remain."""
    if path == family.attention_out and len(kept.units) < base.units:
        return _spans(kept.units, base.unit_heads * base.head_size)
    if path == family.mlp_out and len(kept.neurons) < base.neurons:
        return kept.neurons
    return None


def _spans(units: Iterable[int], size: int) -> Indices:
    """The indices of all elements of these units, for units of `size` consecutive elements."""
    return tuple(index for unit in units for index in range(unit * size, (unit + 1) * size))


def _path_in_narrowed(family: Architecture, path: str, base: Widths, kept: Kept) -> str | None:
    """The path in the narrowed block of a tensor of the base's block; None for a removed expert or norm of a head."""
    if family.experts is not None and (expert := expert_number(family, path)) is not None:
        if expert not in kept.experts:
            return None
        start = f"{family.experts.path}."
        return f"{start}{kept.experts.index(expert)}{path.removeprefix(f'{start}{expert}')}"
    match = _PER_HEAD.fullmatch(path)
    if match is None:
        return path
    norms, which, number, rest = match.groups()
    if which == "k" and not base.grouped:
        return path
    stay = _spans(kept.units, base.unit_heads if which == "q" else 1)
    return f"{norms}.{stay.index(int(number))}{rest}" if int(number) in stay else None
