"""Counts how many of the base's parameters a bundle sends unchanged, compressed, or not at all. Torch-free."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Self

from offsite.config import PackSpec
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.heal.heal_steps import Healed
from offsite.model_owner.narrow.even_widths import base_widths, block_shapes
from offsite.models.block_widths import Kept, narrowed_names
from offsite.models.modules.declared import Declared
from offsite.protocol.manifest import Split
from offsite.storage.safetensors_files import TensorRange, read_chunks


@dataclass(frozen=True)
class BaseShares:
    """How many of the base's parameters a bundle sends unchanged, compressed, or not at all.

    All parameters of a tensor count alike. A tensor is `verbatim` if the bundle has all its values, at most rounded to
    the bundle's dtype; `compressed` if any of them is changed, left out or stored with fewer bits; `not_sent` if the
    bundle has nothing of it.
    """

    verbatim: int
    compressed: int
    not_sent: int

    @property
    def fractions(self) -> dict[str, float]:
        """The three counts as fractions of the base's number of parameters, keyed by field name."""
        total = self.verbatim + self.compressed + self.not_sent
        return {name: count / total for name, count in asdict(self).items()}

    def to_json(self) -> str:
        """The three counts as a JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the counts from the JSON of `to_json`.

        Raises:
            ValueError: the JSON is malformed.
        """
        try:
            return cls(**json.loads(text))
        except TypeError as problem:
            raise ValueError(f"its shares are malformed: {problem}") from None


def base_shares(
    model: BaseModel,
    kept: Sequence[int],
    numbers: Split,
    healed: Healed,
    declared: Declared | None,
    spec: PackSpec,
) -> BaseShares:
    """Count the base's parameters that a bundle sends verbatim, compressed, or not at all.

    Args:
        model: the opened base.
        kept: base indices of the bundle's blocks, in order.
        numbers: the numbers of blocks in the bundle's parts.
        healed: the tensors that narrowing, healing or pruning changed, and which heads, neurons and experts remain in
            narrowed blocks.
        declared: what the bundle's config declares of blocks that differ from the family's; None if none does.
        spec: the settings of pruning and of stored forms.
    """
    family, verbatim_blocks = model.family, {kept[index] for index in numbers.verbatim}
    encoded = (
        {f"{path}.weight" for path in family.linears} if any(f.encodes_matrices for f in spec.stored_forms) else ()
    )
    counts = dict.fromkeys(("verbatim", "compressed", "not_sent"), 0)
    narrowed = {}
    renamed = {index: _renamed(model, index, stays) for index, stays in healed.kept.items()}
    if declared is not None:
        narrowed = {
            index: declared.narrowed(
                family, model.config, block_shapes(model, index), kept.index(index) - numbers.bottom
            )
            for index in set(kept) - verbatim_blocks
        }
    for name, tensor in model.tensors.items():
        place = family.block_of(name)
        if place is None or place[0] in verbatim_blocks:
            kind = "verbatim"
        elif place[0] not in kept or (place[0] in renamed and place[1] not in renamed[place[0]]):
            kind = "not_sent"
        else:
            path = renamed.get(place[0], {}).get(place[1], place[1])
            narrower = bool(narrowed) and narrowed[place[0]].get(path) != tensor.shape
            stored = healed.tensors.get(family.in_block(place[0], path))
            replaced = stored is not None and (path == place[1] or not _holds(stored, tensor))
            changed = replaced or place[1] in encoded or bool(spec.pruned and family.is_linear(name))
            kind = "compressed" if narrower or changed else "verbatim"
        counts[kind] += math.prod(tensor.shape)
    return BaseShares(**counts)


def _renamed(model: BaseModel, index: int, stays: Kept) -> dict[str, str]:
    """The path in the narrowed block of each remaining tensor, keyed by its path in the base block.

    They differ for experts and norms of heads, which are renumbered from 0.

    Args:
        model: the opened base.
        index: the block's index in the base.
        stays: the indices of the heads, neurons and experts that remain.
    """
    names = narrowed_names(model.family, model.block(index), base_widths(model, index), stays)
    return {path: name for name, path in names.items()}


def _holds(stored: TensorRange, tensor: TensorRange) -> bool:
    """Whether a stored tensor has the values of the base's tensor, after these are rounded to the stored dtype."""
    return b"".join(read_chunks(stored)) == b"".join(read_chunks(tensor, stored.dtype))
