"""The kinds of blocks of a family that was derived from one model, because it is not in the table. Torch-free."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

_NUMBER = re.compile(r"0|[1-9]\d{0,3}")


@dataclass(frozen=True)
class Layout:
    """One kind of block: the shapes of its tensors, and the linear layers that adapters use.

    In a path, "*" stands for the index of an expert.
    """

    shapes: Mapping[str, tuple[int, ...]]  # of every tensor, by path in the block
    linears: tuple[str, ...]  # paths of the linear layers where LoRA may sit
    attention_out: str = ""  # paths of the linear layers that end attention and MLP; "" where there is none
    mlp_out: str = ""
    buffers: frozenset[str] = frozenset()  # paths of tensors that no training changes
    experts: int = 0  # number of experts, whose indices replace "*"

    @property
    def outputs(self) -> tuple[str, ...]:
        """The paths of the last linear layers of attention and MLP, where they exist; bottlenecks may follow them."""
        return tuple(path for path in (self.attention_out, self.mlp_out) if path)

    def tensors(self) -> frozenset[str]:
        """The paths of all tensors of a block, with the index of each expert instead of "*"."""
        return frozenset(one for path in self.shapes for one in self._numbered(path))

    def shape_of(self, path: str) -> tuple[int, ...] | None:
        """The shape of the tensor at this path in a block; None if the block has no such tensor."""
        parts = path.split(".")
        patterns = (
            ".".join([*parts[:place], "*", *parts[place + 1 :]])
            for place, part in enumerate(parts)
            if _NUMBER.fullmatch(part) and int(part) < self.experts
        )
        return next((self.shapes[one] for one in (path, *patterns) if one in self.shapes), None)

    def _numbered(self, path: str) -> list[str]:
        """The paths that a path with "*" stands for, one per expert; any other path alone."""
        return [path.replace("*", str(number)) for number in range(self.experts)] if "*" in path else [path]
