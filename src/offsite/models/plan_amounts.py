"""The values that plans consist of: parts of a model, and amounts of bytes. Torch-free.

They are in `models`, because they describe sizes of models, and because both parties and the command line import it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Compute = Literal["bf16", "fp32"]


@dataclass(frozen=True)
class Part:
    """A part of a model: its number of blocks (0 outside the blocks), of parameters, and of bytes in the files."""

    name: str
    blocks: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Amount:
    """A name and a number of bytes: the size of a file, or of tensors in memory or on the disk."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Memory:
    """The memory that the weights need in one compute dtype; activations and libraries need memory in addition."""

    compute: Compute
    amounts: tuple[Amount, ...]

    @property
    def bytes(self) -> int:
        """The number of bytes of all amounts together."""
        return total(self.amounts)


@dataclass(frozen=True)
class Measurement:
    """Memory and time measured on this machine, by running a small part of the stage."""

    what: str  # the part of the stage that ran
    device: str
    compute: Compute
    peak_bytes: int  # peak memory of the process, or of torch on a CUDA device
    seconds: float  # duration of that part
    times: float  # about how often the whole run repeats that part

    @property
    def run_seconds(self) -> float:
        """Estimated seconds for the whole run, without loading, validating and writing."""
        return self.seconds * self.times


def part(name: str, shapes: Iterable[tuple[int, ...]], item: int, blocks: int = 0) -> Part:
    """Construct a `Part` from its tensors' shapes and the bytes of one stored value (`item`)."""
    parameters = sum(math.prod(shape) for shape in shapes)
    return Part(name, blocks, parameters, parameters * item)


def total(amounts: Iterable[Amount]) -> int:
    """The number of bytes of all amounts together."""
    return sum(amount.bytes for amount in amounts)
