"""The values that plans of both parties consist of: parts of a model, and sizes in bytes. Torch-free.

It stands here because both parties and the command line may import it, and sizes of models are all that it is about.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Compute = Literal["bf16", "fp32"]


@dataclass(frozen=True)
class Part:
    """A part of a model: its blocks (0 if it is not made of blocks), its parameters, and their bytes as stored."""

    name: str
    blocks: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Amount:
    """Something that takes memory or disk space: a file, or tensors."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Memory:
    """What the weights take in memory under a compute dtype; activations and libraries come on top of it."""

    compute: Compute
    amounts: tuple[Amount, ...]

    @property
    def bytes(self) -> int:
        """Of all amounts together."""
        return total(self.amounts)


@dataclass(frozen=True)
class Measurement:
    """What was measured on this machine, by running a small part of the stage."""

    what: str  # that ran
    device: str
    compute: Compute
    peak_bytes: int  # of the process, or of what torch holds on a CUDA device
    seconds: float  # that it took
    times: float  # how often the whole run does that, about

    @property
    def run_seconds(self) -> float:
        """The estimated seconds of the whole run, without loading, validation and writing."""
        return self.seconds * self.times


def part(name: str, shapes: Iterable[tuple[int, ...]], item: int, blocks: int = 0) -> Part:
    """Make a `Part` from the shapes of its tensors and the bytes of one stored value."""
    parameters = sum(math.prod(shape) for shape in shapes)
    return Part(name, blocks, parameters, parameters * item)


def total(amounts: Iterable[Amount]) -> int:
    """The sum of the bytes of all amounts."""
    return sum(amount.bytes for amount in amounts)
