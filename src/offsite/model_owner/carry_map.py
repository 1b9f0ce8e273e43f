"""The map from the blocks and layers of a bundle to those of the base, in the owner's ledger. Torch-free.

Adapters may be on blocks that have fewer heads, neurons or experts than the base's. For each block of the bundle the
map has the index of the base's block, and for each narrowed layer the base's inputs and outputs that the bundle's layer
still has; the outputs of a router are its experts. A plug-in has zeros for the others (LoRAM, arXiv 2502.13533, section
3). The map is never sent, because it reveals which neurons, heads, experts and blocks were kept.
"""

import base64
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

_Index = Annotated[int, Field(ge=0, lt=2**32)]
_Indices = Annotated[tuple[_Index, ...], Field(strict=False)]


@dataclass(frozen=True)
class KeptFeatures:
    """The indices of the inputs and outputs of a base layer that the bundle's layer still has, in its order.

    None means all of them. A norm has only `outputs`.
    """

    inputs: tuple[int, ...] | None = None
    outputs: tuple[int, ...] | None = None


ALL = KeptFeatures()
Narrowed = Mapping[str, KeptFeatures]  # of one block, by the layer's path in the block; other layers keep everything


@dataclass(frozen=True)
class CarriedBlock:
    """The base block that a block of the bundle was made from.

    `narrowed` has the inputs and outputs that remain in its narrowed layers, keyed by the layer's path in the block.
    """

    base: int  # index in the base
    narrowed: Narrowed = field(default_factory=dict)


@dataclass(frozen=True)
class CarryMap:
    """The map from the blocks and layers of a bundle to those of the base.

    `shipped` has the sent values of biases of compressed blocks, which a return may contain: as bytes in the manifest's
    dtype, keyed by their name in the bundle. A returned bias minus this value is its change; the base's value can
    differ.
    """

    blocks: tuple[CarriedBlock, ...]
    shipped: Mapping[str, bytes] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        kept: Sequence[int],
        narrowed: Mapping[int, Narrowed] | None = None,
        shipped: Mapping[str, bytes] | None = None,
    ) -> "CarryMap":
        """Make the map of a bundle.

        Args:
            kept: base indices of the bundle's blocks, in order.
            narrowed: the inputs and outputs that remain in the narrowed layers of blocks, keyed by the block's index in
                the bundle; None if no block is narrowed.
            shipped: the sent values of biases of compressed blocks, see the class; None if a return has no such biases.
        """
        of_blocks = narrowed or {}
        return cls(tuple(CarriedBlock(base, of_blocks.get(at, {})) for at, base in enumerate(kept)), shipped or {})

    def features(self, block: int, layer: str) -> KeptFeatures:
        """The inputs and outputs of a base layer that the bundle's layer still has.

        Args:
            block: the block's index in the bundle.
            layer: the layer's path in the block.
        """
        return self.blocks[block].narrowed.get(layer, ALL)


class _StoredBlock(BaseModel):
    """The JSON of a `CarriedBlock`; the lists of remaining inputs and outputs are in `_StoredMap.lists`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    base: _Index
    narrowed: dict[str, tuple[int | None, int | None]] = {}  # layer -> indices of its two lists; None: all


class _StoredMap(BaseModel):
    """The JSON of a `CarryMap`; equal lists of features are stored once, as an MLP's layers have the same neurons."""

    model_config = ConfigDict(extra="forbid", strict=True)

    bundle: str
    lists: tuple[_Indices, ...]
    blocks: tuple[_StoredBlock, ...]
    shipped: dict[str, str]

    @model_validator(mode="after")
    def _consistent(self) -> "_StoredMap":
        if any(later <= index for one in self.lists for index, later in itertools.pairwise(one)):
            raise ValueError("a list of kept features is not in ascending order")
        used = {number for block in self.blocks for pair in block.narrowed.values() for number in pair}
        if not used - {None} <= set(range(len(self.lists))):
            raise ValueError("a block names a list of kept features that is not there")
        return self


def render_carry_map(carry: CarryMap, bundle: str) -> str:
    """The map as JSON, with the digest of its bundle, which is `bundle`."""
    lists: dict[tuple[int, ...], int] = {}

    def number(features: tuple[int, ...] | None) -> int | None:
        return None if features is None else lists.setdefault(features, len(lists))

    blocks = tuple(
        _StoredBlock(
            base=block.base,
            narrowed={path: (number(kept.inputs), number(kept.outputs)) for path, kept in block.narrowed.items()},
        )
        for block in carry.blocks
    )
    shipped = {name: base64.b64encode(values).decode() for name, values in carry.shipped.items()}
    return _StoredMap(bundle=bundle, lists=tuple(lists), blocks=blocks, shipped=shipped).model_dump_json()


def parse_carry_map(text: str, bundle: str) -> CarryMap:
    """Read a map from the JSON of `render_carry_map`; `bundle` is the digest of the bundle that it must belong to.

    Raises:
        ValueError: the JSON is malformed, or the map belongs to a bundle with another digest.
    """
    try:
        stored = _StoredMap.model_validate_json(text)
        shipped = {name: base64.b64decode(values, validate=True) for name, values in stored.shipped.items()}
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ValueError(f"its map is malformed: {problem['msg']}") from None
    if stored.bundle != bundle:
        raise ValueError(f"its map is the one of bundle {stored.bundle[:12]}")

    def features(number: int | None) -> tuple[int, ...] | None:
        return None if number is None else stored.lists[number]

    blocks = tuple(
        CarriedBlock(
            block.base,
            {path: KeptFeatures(*map(features, numbers)) for path, numbers in block.narrowed.items()},
        )
        for block in stored.blocks
    )
    return CarryMap(blocks, shipped)
