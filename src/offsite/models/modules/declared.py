"""The part of a bundle's config that says how modules of the emulator differ from those of the family. Torch-free.

transformers cannot load such a bundle: its config has the model type "offsite" with the family's config under one key,
and its weights file has another name, so that no library loads it partially. Names, shapes and dtypes of its tensors
follow from the family and from this declaration.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from offsite.models.block_widths import Shapes, Widths, narrowed_shapes, widths_of
from offsite.models.families.family import Architecture
from offsite.storage.safetensors_files import FLOATS

MODEL_TYPE = "offsite"
FEATURES = ("share", "quantise", "svd", "mlp-width", "sparse", "affine", "heads", "neurons", "experts")
OF_MIXTURES = frozenset({"heads", "experts"})  # the features that an emulator of a mixture of experts can have
AFFINE_WEIGHT, AFFINE_BIAS = "affine.weight", "affine.bias"  # paths in a block of the affine layer after it

_Shape = Annotated[tuple[Annotated[int, Field(ge=1, lt=2**32)], ...], Field(max_length=2, strict=False)]
Numbers = Annotated[
    tuple[Annotated[int, Field(ge=1, le=2**20)], ...], Field(min_length=1, max_length=10_000, strict=False)
]
Experts = Annotated[
    tuple[Annotated[int, Field(ge=0, le=1024)], ...], Field(min_length=1, max_length=10_000, strict=False)
]
Expected = tuple[tuple[int, ...], tuple[str, ...]]  # a tensor's shape, and the dtypes that it may have


def _is_none(value: object) -> bool:
    return value is None


class Declared(BaseModel):
    """How modules of the emulator differ from those of the family: shared, quantised, sparse, narrower or others.

    None in a field means that there is no such difference.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    first: Annotated[int, Field(ge=0, le=10_000)]  # index in the bundle of the emulator's first block
    blocks: Annotated[int, Field(ge=1, le=10_000)]
    # for each block of the emulator, the index in the emulator of the block whose weights it uses
    share: Annotated[tuple[int, ...], Field(min_length=1, max_length=10_000, strict=False)] | None = None
    bits: Literal[8, 4] | None = None  # of a quantised weight
    group: Literal[64, 128] | None = None  # with bits: number of weights that share a scale
    svd_rank: Annotated[float, Field(gt=0, le=1)] | None = None
    mlp_width: Annotated[int, Field(ge=1, le=2**20)] | None = None
    sparse: Annotated[float, Field(gt=0, lt=1)] | None = None  # share of every matrix that is zero and not stored
    affine: bool | None = None  # true: an affine layer after every block
    # the shapes of tensors of the emulator's blocks in the family, by path in the block: those that no block of the
    # bundle has in the family's shape
    shapes: Annotated[dict[str, _Shape] | None, Field(min_length=1, max_length=4096, exclude_if=_is_none)] = None
    heads: Numbers | None = None  # query heads of each block of the emulator
    neurons: Numbers | None = None  # of the MLP of each block of the emulator
    # experts of each block of the emulator, 0 for a block that has none in the family
    experts: Annotated[Experts | None, Field(exclude_if=_is_none)] = None

    @model_validator(mode="after")
    def _consistent(self) -> "Declared":
        """Validator: fields do not contradict each other, and at least one difference is declared."""
        if (self.bits is None) != (self.group is None):
            raise ValueError("bits and group must both be set, or neither")
        if sum(kind is not None for kind in (self.bits, self.svd_rank, self.sparse)) > 1:
            raise ValueError("a linear layer is quantised, factored or sparse, and never two of these")
        if self.affine is False:
            raise ValueError("affine is true or null")
        if self.share is not None and self.affine:
            raise ValueError("blocks that share weights have no affine layers after them")
        for place, owner in enumerate(self.share or ()):
            if not 0 <= owner < len(self.share or ()) or (self.share or ())[owner] != owner:
                raise ValueError(f"block {place} of the emulator shares the weights of {owner}, which holds none")
        if self.share is not None and len(self.share) != self.blocks:
            raise ValueError(f"{len(self.share)} entries for {self.blocks} blocks of the emulator")
        if not self.features:
            raise ValueError("nothing is declared")
        return self

    @model_validator(mode="after")
    def _consistent_widths(self) -> "Declared":
        """Validator: numbers of heads, neurons and experts have one entry per block, and fit the other fields."""
        for name, numbers in (("heads", self.heads), ("neurons", self.neurons), ("experts", self.experts)):
            if numbers is not None and len(numbers) != self.blocks:
                raise ValueError(f"{len(numbers)} entries in {name} for {self.blocks} blocks of the emulator")
        if self.mlp_width is not None and self.neurons is not None:
            raise ValueError("mlp_width and neurons are two ways to say the same")
        if self.share is not None and any(one is not None for one in (self.heads, self.neurons, self.experts)):
            raise ValueError("blocks that share weights have no widths of their own")
        return self

    @property
    def features(self) -> tuple[str, ...]:
        """The names of the declared differences, which a reader must support; the manifest's `requires` lists them."""
        kinds = (
            self.share, self.bits, self.svd_rank, self.mlp_width, self.sparse, self.affine, self.heads, self.neurons,
            self.experts,
        )  # fmt: skip
        return tuple(name for name, kind in zip(FEATURES, kinds, strict=True) if kind is not None)

    def holds_weights(self, place: int) -> bool:
        """Whether a block of the emulator has its own weights in the file, instead of using those of another block.

        Args:
            place: index of the block in the emulator, from 0.
        """
        return self.share is None or self.share[place] == place

    def rank(self, inputs: int, outputs: int) -> int:
        """The rank of a factored linear layer with these numbers of inputs and outputs."""
        return max(1, round((self.svd_rank or 0) * min(inputs, outputs)))

    @property
    def narrows(self) -> bool:
        """Whether blocks of the emulator have fewer heads, MLP neurons or experts than the family's blocks."""
        return any(kind is not None for kind in (self.mlp_width, self.heads, self.neurons, self.experts))

    def widths(self, base: Widths, place: int) -> Widths:
        """The widths of one block of the emulator.

        Args:
            base: the widths of the family's own blocks.
            place: index of the block in the emulator, from 0.

        Raises:
            ValueError: a declared number is more than the family's blocks have; the heads that remain are not all query
                heads of some key-value heads; or there are fewer experts than process a token.
        """
        heads = base.heads if self.heads is None else self.heads[place]
        neurons = base.neurons if self.neurons is None else self.neurons[place]
        neurons = neurons if self.mlp_width is None else self.mlp_width
        if heads > base.heads or heads % base.unit_heads or neurons > base.neurons:
            raise ValueError(
                f"block {place} of the emulator has {heads} heads and {neurons} neurons, of {base.heads} and "
                f"{base.neurons}; heads go by {base.unit_heads}"
            )
        experts = base.experts if self.experts is None else self.experts[place]
        if not base.chosen <= experts <= base.experts:
            raise ValueError(
                f"block {place} of the emulator has {experts} experts, expected {base.chosen}, through which a token "
                f"goes, to {base.experts}"
            )
        return base.narrowed(heads // base.unit_heads, neurons, experts)

    def narrowed(
        self, family: Architecture, config: Mapping[str, Any], shapes: Shapes, place: int
    ) -> dict[str, tuple[int, ...]]:
        """The shapes of an emulator block's tensors, before any matrix is quantised, factored or made sparse.

        Args:
            family: the model's family.
            config: the family's config.
            shapes: the shapes of the tensors of the family's own block, by path in the block.
            place: index of the block in the emulator, from 0.

        Returns:
            The shapes, by path in the block.

        Raises:
            ValueError: the declared widths do not fit the family's block.
            IncompatibleError: the config does not say how many heads a block has.
        """
        if not self.narrows:
            return dict(shapes)
        base = widths_of(family, config, shapes)
        return narrowed_shapes(family, shapes, base, self.widths(base, place))

    def tensors(
        self, family: Architecture, config: Mapping[str, Any], shapes: Shapes, place: int
    ) -> dict[str, Expected]:
        """The shape and the permitted dtypes of each tensor that the file has for one block of the emulator, by path.

        Arguments and errors as for `narrowed`.
        """
        plain = self.narrowed(family, config, shapes, place)
        found: dict[str, Expected] = {path: (shape, FLOATS) for path, shape in plain.items()}
        if self.affine:
            hidden = shapes[f"{family.attention_out}.weight"][1 if family.transposed else 0]
            found |= {path: (shape, FLOATS) for path, shape in affine_shapes(hidden).items()}
        if self.bits is None and self.svd_rank is None and self.sparse is None:
            return found
        for path in family.linears:
            shape, _ = found.pop(f"{path}.weight")
            inputs, outputs = shape if family.transposed else shape[::-1]
            if self.bits is not None and self.group is not None:
                stored = inputs if self.bits == 8 else -(-inputs // 2)
                found[f"{path}.quantised"] = ((outputs, stored), ("I8" if self.bits == 8 else "U8",))
                found[f"{path}.scales"] = ((outputs, -(-inputs // self.group)), FLOATS)
            elif self.sparse is not None:
                found[f"{path}.mask"] = ((outputs, -(-inputs // 8)), ("U8",))
                found[f"{path}.values"] = ((outputs * inputs - int(self.sparse * outputs * inputs),), FLOATS)
            else:
                rank = self.rank(inputs, outputs)
                found[f"{path}.down"] = ((rank, inputs), FLOATS)
                found[f"{path}.up"] = ((outputs, rank), FLOATS)
        return found


def affine_shapes(hidden: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of an affine layer after a block with hidden size `hidden`, by path in the block."""
    return {AFFINE_WEIGHT: (hidden, hidden), AFFINE_BIAS: (hidden,)}


def wrapped(config: Mapping[str, Any], declared: Declared) -> dict[str, Any]:
    """Make a bundle's config.json from the family's config and the declaration of the emulator's modules."""
    return {"model_type": MODEL_TYPE, "base": dict(config), "emulator": declared.model_dump(mode="json")}


def unwrapped(config: Mapping[str, Any]) -> tuple[dict[str, Any], Declared | None]:
    """Split a config.json into the family's config and the declaration of the emulator's modules (None if it has none).

    Raises:
        ValueError: the config has the model type "offsite" and is malformed.
    """
    if config.get("model_type") != MODEL_TYPE:
        return dict(config), None
    base = config.get("base")
    if set(config) != {"model_type", "base", "emulator"} or not isinstance(base, dict):
        raise ValueError(f"a config of type {MODEL_TYPE!r} has model_type, base and emulator, and nothing else")
    try:
        return dict(base), Declared.model_validate(config["emulator"])
    except ValidationError as error:
        problems = "; ".join(str(problem["msg"])[:200] for problem in error.errors(include_url=False)[:4])
        raise ValueError(f"the emulator's declaration is malformed: {problems}") from None
