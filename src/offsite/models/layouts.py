"""The kinds of blocks of a family that no row of the table describes, as they were read off one model. Torch-free."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

_NUMBER = re.compile(r"0|[1-9]\d{0,3}")


@dataclass(frozen=True)
class Layout:
    """The tensors of one kind of block, and the linear layers that adapters use. "*" in a path: number of an expert."""

    shapes: Mapping[str, tuple[int, ...]]  # of every tensor, by path in the block
    linears: tuple[str, ...]  # paths of the linear layers where LoRA may sit
    attention_out: str = ""  # paths of the linear layers that end attention and MLP; "" where there is none
    mlp_out: str = ""
    buffers: frozenset[str] = frozenset()  # paths of tensors that no training changes
    experts: int = 0  # for how many numbers a path with "*" stands

    @property
    def outputs(self) -> tuple[str, ...]:
        """The paths of the layers after which bottlenecks may sit."""
        return tuple(path for path in (self.attention_out, self.mlp_out) if path)

    def tensors(self) -> frozenset[str]:
        """The paths of all tensors of a block, with the number of each expert."""
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
        return [path.replace("*", str(number)) for number in range(self.experts)] if "*" in path else [path]
