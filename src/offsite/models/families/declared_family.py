"""The description of a model family in a bundle's manifest, for a model type that is not in the table. Torch-free.

It is data from the other party, limited to a closed set of fields: the names and shapes of the bundle's own tensors. It
names no class, no file and no code. The class comes from the installed transformers, by the model type.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from offsite.models.families.family import Architecture, Experts
from offsite.models.families.layouts import Layout
from offsite.models.families.transformers_types import causal_class, config_keys

_WORD = r"[A-Za-z0-9][A-Za-z0-9_]*"  # no "__class__": a path of a module looks nothing else up
Path = Annotated[str, Field(pattern=rf"^[A-Za-z][A-Za-z0-9_]*(\.{_WORD})*$", max_length=200)]
Pattern = Annotated[str, Field(pattern=rf"^[A-Za-z][A-Za-z0-9_]*(\.{_WORD})*(\.\*)?(\.{_WORD})*$", max_length=200)]
Key = Annotated[str, Field(pattern=r"^[a-z][A-Za-z0-9_]*$", max_length=64)]
Shape = Annotated[tuple[Annotated[int, Field(ge=0, lt=2**40)], ...], Field(max_length=8, strict=False)]
_MOST_TENSORS = 200_000  # of all kinds of blocks together
_MOST_EXPERTS = 1024
_LARGEST = 2**22  # of the whole numbers in a config: some classes compute tables of that length


class _Part(BaseModel):
    """Base class of the parts of the description: frozen, strict, without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DeclaredTensor(_Part):
    """The name, shape and role of a tensor.

    The name is the full name, or for a tensor of a block its path in the block, with "*" for the index of an expert.
    """

    name: Pattern
    shape: Shape
    role: Literal["weight", "linear", "buffer"] = "weight"  # linear: weight of a layer where LoRA may sit


class DeclaredLayout(_Part):
    """One kind of block: its tensors, and the last linear layers of attention and of the MLP ("" if it has none)."""

    tensors: Annotated[tuple[DeclaredTensor, ...], Field(min_length=1, max_length=4096, strict=False)]
    attention_out: Path | Literal[""] = ""
    mlp_out: Path | Literal[""] = ""
    experts: Annotated[int, Field(ge=0, le=_MOST_EXPERTS)] = 0

    @model_validator(mode="after")
    def _consistent(self) -> "DeclaredLayout":
        """Validator: names are unique, and experts and output layers belong to tensors of the block."""
        names = [tensor.name for tensor in self.tensors]
        _require_once(names)
        if any("*" in name for name in names) != bool(self.experts):
            raise ValueError("a number of experts goes with tensors of experts")
        for out in (self.attention_out, self.mlp_out):
            if out and not any(name.startswith(f"{out}.") for name in names):
                raise ValueError(f"{out} holds no tensor of its block")
        if any(tensor.role == "linear" and not _is_matrix(tensor) for tensor in self.tensors):
            raise ValueError("a linear layer has a matrix as its weight")
        return self

    def layout(self) -> Layout:
        """The same kind of block as a `Layout`, the form that other code uses."""
        return Layout(
            shapes={tensor.name: tensor.shape for tensor in self.tensors},
            linears=tuple(tensor.name.removesuffix(".weight") for tensor in self.tensors if tensor.role == "linear"),
            attention_out=self.attention_out,
            mlp_out=self.mlp_out,
            buffers=frozenset(tensor.name for tensor in self.tensors if tensor.role == "buffer"),
            experts=self.experts,
        )


class DeclaredStack(_Part):
    """A parameter in which linear layers of all experts of a block are stacked.

    `maps` are the linear layers of one expert whose outputs it concatenates, in order.
    """

    parameter: Path
    maps: Annotated[tuple[Path, ...], Field(min_length=1, max_length=4, strict=False)]


class DeclaredFamily(_Part):
    """A model family that is not in the table, as a bundle's manifest describes it.

    It lists the names and shapes of all tensors, and the config keys that depend on the number of blocks. The model
    owner derived it from the base and tested it with the base's weights before packing.
    """

    blocks: Path  # of the list of blocks
    layouts: Annotated[tuple[DeclaredLayout, ...], Field(min_length=1, max_length=64, strict=False)]
    layout_of: Annotated[tuple[int, ...], Field(min_length=1, max_length=10_000, strict=False)]  # index in `layouts`
    embeddings: Annotated[tuple[DeclaredTensor, ...], Field(min_length=1, max_length=256, strict=False)]
    final: Annotated[tuple[DeclaredTensor, ...], Field(max_length=256, strict=False)]
    head: Path
    head_shape: Shape
    tied: bool
    transposed: bool
    count_keys: Annotated[tuple[Key, ...], Field(max_length=8, strict=False)]
    per_block: Annotated[tuple[Key, ...], Field(max_length=32, strict=False)] = ()  # lists with an entry per block
    expert_path: Path | Literal[""] = ""  # of the experts in a block, in files
    expert_module: Path | Literal[""] = ""  # of their stacks, in modules
    stacks: Annotated[tuple[DeclaredStack, ...], Field(max_length=8, strict=False)] = ()

    @model_validator(mode="after")
    def _consistent(self) -> "DeclaredFamily":
        """Validator: the parts fit each other, and a tensor outside the blocks has no name of one within."""
        if any(not 0 <= kind < len(self.layouts) for kind in self.layout_of):
            raise ValueError("layout_of names a kind of block that is not declared")
        if sum(len(one.tensors) * max(1, one.experts) for one in self.layouts) > _MOST_TENSORS:
            raise ValueError(f"more than {_MOST_TENSORS} tensors are declared")
        outer = [tensor.name for tensor in (*self.embeddings, *self.final)]
        _require_once([*outer, self.head])
        if any("*" in name or f"{name}.".startswith(f"{self.blocks}.") for name in (*outer, self.head)):
            raise ValueError("a tensor outside the blocks has the name of one within")
        if not self.head.endswith(".weight") or len(self.head_shape) != 2:
            raise ValueError("the head is not the weight of a linear layer")
        if not bool(self.expert_path) == bool(self.expert_module) == bool(self.stacks) or bool(self.stacks) < any(
            one.experts for one in self.layouts
        ):
            raise ValueError("experts, their path and their stacks go together")
        if not self.count_keys and not self.per_block:
            raise ValueError("no config key says how many blocks there are")
        if any("." in name for stack in self.stacks for name in (stack.parameter, *stack.maps)):
            raise ValueError("a stack of experts and its maps are named by one word each")
        return self

    def architecture(self, model_type: str, class_name: str) -> Architecture:
        """The same family as an `Architecture`, the form that other code uses.

        Args:
            model_type: the model type in configs.
            class_name: the class that transformers' causal mapping names for that type.
        """
        layouts = tuple(one.layout() for one in self.layouts)
        first = next((one for one in layouts if one.outputs), layouts[0])
        return Architecture(
            model_type=model_type,
            class_name=class_name,
            blocks=self.blocks,
            embeddings={tensor.name: sizes(tensor.shape) for tensor in self.embeddings},
            final={tensor.name: sizes(tensor.shape) for tensor in self.final},
            head=self.head,
            head_size=sizes(self.head_shape),
            linears={path: sizes(one.shapes[f"{path}.weight"]) for one in layouts for path in one.linears},
            norms={},
            attention_out=first.attention_out,
            mlp_out=first.mlp_out,
            count_keys=self.count_keys,
            config_keys=config_keys(model_type),
            tied_by_default=self.tied,
            transposed=self.transposed,
            linear_residual=False,
            runs_by_block=False,
            per_block=dict.fromkeys(self.per_block, _never_derived),
            experts=self._experts(layouts),
            layouts=layouts,
            layout_of=self.layout_of,
        )

    def _experts(self, layouts: Sequence[Layout]) -> Experts | None:
        """The description of the experts; None if no stack of experts is declared."""
        if not self.stacks:
            return None
        maps = [name for stack in self.stacks for name in stack.maps]
        return Experts(
            path=self.expert_path,
            module=self.expert_module,
            maps=dict.fromkeys(maps, ""),
            out=maps[-1],
            stacks={stack.parameter: stack.maps for stack in self.stacks},
        )


@lru_cache(maxsize=16)
def declared_architecture(row: DeclaredFamily, model_type: str) -> Architecture:
    """The `Architecture` of a declared family and a model type; cached: equal arguments return the same object."""
    return row.architecture(model_type, causal_class(model_type) or "")


def declare_family(family: Architecture, blocks: Iterable[int]) -> DeclaredFamily:
    """Describe a family for the manifest of a bundle.

    Args:
        family: a family from `derive_family`.
        blocks: for each block of the bundle, its index in the base.
    """
    kinds = [family.layout_of[index] for index in blocks]
    used = sorted(set(kinds))
    experts = family.experts
    return DeclaredFamily(
        blocks=family.blocks,
        layouts=tuple(_declared_layout(family.layouts[kind]) for kind in used),
        layout_of=tuple(used.index(kind) for kind in kinds),
        embeddings=_outer(family.embeddings),
        final=_outer(family.final),
        head=family.head,
        head_shape=tuple(map(int, family.head_size.split())),
        tied=family.tied_by_default,
        transposed=family.transposed,
        count_keys=family.count_keys,
        per_block=tuple(family.per_block),
        expert_path=experts.path if experts else "",
        expert_module=experts.module if experts else "",
        stacks=tuple(DeclaredStack(parameter=name, maps=maps) for name, maps in experts.stacks.items())
        if experts
        else (),
    )


def declared_config_problems(config: Mapping[str, Any], family: Architecture) -> list[str]:
    """A message for each config value that a declared family excludes: nested models, large integers, other dtypes."""
    problems = [
        f"{where} = {str(value)[:60]}, expected at most {_LARGEST:,}"
        for where, value in _numbers(config)
        if not -_LARGEST <= value <= _LARGEST and "theta" not in where
    ]
    problems += [
        f"{key}.model_type, which is another model's" for key, value in config.items() if _names_a_model(value)
    ]
    if config.get("dtype") not in (None, "float32", "bfloat16", "float16"):
        problems.append(f"dtype = {str(config['dtype'])[:60]!r}, expected float32, bfloat16 or float16")
    if bool(config.get("tie_word_embeddings")) != family.tied_by_default:
        problems.append(f"tie_word_embeddings = {str(config.get('tie_word_embeddings'))[:60]}, declared otherwise")
    return problems


def _numbers(value: object, where: str = "") -> Iterator[tuple[str, int]]:
    """Yield each integer in a JSON value, with the keys that lead to it, joined by dots; these begin with `where`."""
    if type(value) is int:
        yield where, value
    items = (
        value.items()
        if isinstance(value, Mapping)
        else ((where, one) for one in value)
        if isinstance(value, list)
        else ()
    )
    for key, one in items:
        yield from _numbers(one, f"{where}.{key}".lstrip(".") if isinstance(value, Mapping) else where)


def _names_a_model(value: object) -> bool:
    """Whether a JSON value contains an object with the key "model_type"."""
    if isinstance(value, Mapping):
        return "model_type" in value or any(_names_a_model(one) for one in value.values())
    return isinstance(value, list) and any(_names_a_model(one) for one in value)


def sizes(shape: Sequence[int]) -> str:
    """A shape as text, such as "4096 1024": the form in which `Architecture` stores the sizes of a tensor."""
    return " ".join(map(str, shape))


def _declared_layout(layout: Layout) -> DeclaredLayout:
    """The declaration of one kind of block."""
    linear = {f"{path}.weight" for path in layout.linears}

    def role(path: str) -> Literal["weight", "linear", "buffer"]:
        return "linear" if path in linear else "buffer" if path in layout.buffers else "weight"

    return DeclaredLayout(
        tensors=tuple(DeclaredTensor(name=path, shape=shape, role=role(path)) for path, shape in layout.shapes.items()),
        attention_out=layout.attention_out,
        mlp_out=layout.mlp_out,
        experts=layout.experts,
    )


def _outer(tensors: Mapping[str, str]) -> tuple[DeclaredTensor, ...]:
    """The declarations of tensors outside the blocks, from their names and sizes."""
    return tuple(DeclaredTensor(name=name, shape=tuple(map(int, text.split()))) for name, text in tensors.items())


def _require_once(names: Iterable[str]) -> None:
    """Raise ValueError if a name occurs twice."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} is declared twice")


def _is_matrix(tensor: DeclaredTensor) -> bool:
    """Whether a tensor is a two-dimensional weight, and not that of an expert."""
    return tensor.name.endswith(".weight") and len(tensor.shape) == 2 and "*" not in tensor.name


def _never_derived(config: Mapping[str, Any], index: int) -> Any:
    """Placeholder rule of a per-block config list: a declared family's config must contain the list."""
    raise KeyError(index)
