"""What a stage will hold in memory, as sums of named terms, computed from headers and settings alone. Torch-free.

docs/memory.md explains every symbol; `python -m benchmarks.memory` holds the sums against what the operating system
counts. The terms are those of a CPU; on an accelerator the same tensors lie in its memory.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from offsite.config import Method
from offsite.kernels.cpu.cpu_features import has_tiles, multiplies_bf16
from offsite.models.architectures import Architecture
from offsite.storage.safetensors_files import CHUNK_BYTES

# The sizes that bound memory: how much runs at once.
CHUNK_ELEMENTS = 2**25  # logits that exist at once: 64 MiB in bf16
SOFTMAX_ELEMENTS = 2**19  # of these in fp32, for softmax: 2 MiB
CALIBRATION_CHUNK = 512  # tokens in a sequence of calibration text, BOS included
CALIBRATION_BATCH = 8  # sequences of it that run at once
GROUP_TOKENS = 65_536  # tokens of it whose hidden states are in memory on their way to the disk
SEARCH_TOKENS = 16_384  # tokens of it that a search refits and judges a selection on, at most
JUDGED = 8  # every so many of their batches one judges
SHORT_ATTENTION = 128  # tokens; up to here training on a CPU keeps the attention probabilities

# What a process holds before it holds any of the model; measured by benchmarks/memory.py on Linux x86-64, Python 3.11.
PLAIN_LIBRARIES = 58 * 2**20  # the interpreter, NumPy, pydantic: stages that move tensors by name
TORCH_LIBRARIES = 436 * 2**20  # those, torch for CPUs, transformers: stages that run the network
TOKENIZER_FACTOR = 17  # bytes in memory for each byte of tokenizer.json, once loaded
TEXT_FACTOR = 80  # bytes in memory for each byte of a text while it is tokenised
ALLOCATOR_PERCENT = 35  # of activations and logits: room between pieces of many sizes that come and go, on a CPU


@dataclass(frozen=True)
class Term:
    """One thing that lies in memory: how much, and by which formula (symbols as in docs/memory.md)."""

    name: str
    bytes: int
    formula: str


@dataclass(frozen=True)
class Phase:
    """A part of a stage's work; its terms are in memory at the same time."""

    name: str
    terms: tuple[Term, ...]

    @property
    def bytes(self) -> int:
        """The phase's peak."""
        return sum(term.bytes for term in self.terms)


@dataclass(frozen=True)
class Part:
    """A part of a model: its blocks (0 for what is no block), parameters and bytes as stored."""

    name: str
    blocks: int
    parameters: int
    bytes: int


def part(name: str, shapes: Iterable[tuple[int, ...]], item: int, blocks: int = 0) -> Part:
    """A part from its tensors' shapes and the bytes of an item."""
    parameters = sum(math.prod(shape) for shape in shapes)
    return Part(name, blocks, parameters, parameters * item)


@dataclass(frozen=True)
class BlockShape:
    """The sizes of one block that memory depends on; of experts, those that a token goes through."""

    parameters: int  # P_b
    hidden: int  # H
    inner: int  # F: what enters the MLP's output projection, or all of them
    attended: int  # A: what enters the attention's output projection
    projected: int  # Q: outputs of all other linear maps together, of experts of all maps
    heads: int  # of the attention
    gated: bool  # whether its MLP is one that the fused module runs as one function
    linears: int  # linear maps in it

    def forward(self, item: int) -> int:
        """Bytes of a token that a block's forward pass makes: outputs of its maps, and its norms in fp32."""
        return item * (self.projected + self.attended + self.inner) + 8 * self.hidden

    def kept(self, item: int) -> int:
        """Bytes of a token that tuning keeps of that for the backward pass, with what the fused module saves."""
        return item * (self.projected + self.attended + (0 if self.gated else self.inner) + 2 * self.hidden)

    def attention(self, item: int, length: int, *, short: bool) -> int:
        """Bytes of a token that attention keeps beside that: the probabilities of each head, or a row of the mask."""
        return item * length * (self.heads if short else 1)

    def trained(self, item: int, method: Method, width: int) -> int:
        """Further bytes of a token in a block that trains: what enters its maps, and for `full` its norms' outputs.

        The gradient of a bias is the sum of what comes back, for which nothing is kept. Each of two bottlenecks keeps
        its input, and the narrow state on both sides of its activation function.
        """
        if method == "bottleneck":
            return item * 2 * (self.hidden + 2 * width)
        if method == "bitfit":
            return 0
        return item * ((4 if method == "full" else 2) * self.hidden + self.inner)


def block_shape(family: Architecture, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> BlockShape:
    """The sizes of a block.

    Args:
        family: of its family.
        shapes: of the block's tensors, by path in it.
        config: of the model.
    """

    def sizes(path: str) -> tuple[int, int]:  # (inputs, outputs)
        first, second = shapes[f"{path}.weight"]
        return (first, second) if family.transposed else (second, first)

    ends = {family.attention_out, *(family.experts.others if family.experts else (family.mlp_out,))}
    linears = [path for path in family.linears if f"{path}.weight" in shapes]
    inner = sum(sizes(path)[0] for path in linears if path in ends and path != family.attention_out)
    projected = sum(sizes(path)[1] for path in linears if path not in ends)
    first = f"{family.experts.path}.0" if family.experts else ""
    if family.experts and f"{first}.{family.experts.out}.weight" in shapes:
        chosen = int(config.get(family.experts.chosen_key) or 1)
        inner += chosen * sizes(f"{first}.{family.experts.out}")[0]
        projected += chosen * sum(sizes(f"{first}.{path}")[1] for path in family.experts.maps)
    return BlockShape(
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        hidden=sizes(family.attention_out)[1],
        inner=inner,
        attended=sizes(family.attention_out)[0],
        projected=projected,
        heads=int(config.get("num_attention_heads") or config.get("n_head") or 1),
        gated={"mlp.gate_proj.weight", "mlp.up_proj.weight"} <= shapes.keys(),
        linears=len(linears),
    )


def plain_libraries() -> Term:
    """The libraries of a stage that moves tensors by name."""
    return Term("interpreter and libraries", PLAIN_LIBRARIES, "measured constant")


def torch_libraries(tokenizer: int) -> tuple[Term, Term]:
    """The libraries of a stage that runs the network, and its tokenizer, of so many bytes on disk."""
    return (
        Term("interpreter and libraries, torch among them", TORCH_LIBRARIES, "measured constant"),
        Term("tokenizer", TOKENIZER_FACTOR * tokenizer, f"{TOKENIZER_FACTOR} * bytes of its files"),
    )


def encoding(text: int) -> Term:
    """What tokenising a text of so many bytes takes."""
    return Term("encoding the calibration text", TEXT_FACTOR * text, f"{TEXT_FACTOR} * its bytes")


def copy_buffer(largest: int, *, cast: bool) -> Term:
    """What copying tensors holds: a chunk and the one before it, or a chunk and its fp32 steps to another dtype.

    Args:
        largest: bytes of the largest tensor.
        cast: whether the dtype changes on the way.
    """
    chunks = 5 if cast else 2
    return Term("copy buffer", chunks * min(largest, CHUNK_BYTES), f"{chunks} * min(8 MiB, largest tensor)")


def loss_chunk(labels: int, vocabulary: int, item: int) -> Term:
    """The logits that exist at once, and what softmax makes of a few rows of them in fp32."""
    rows, few = (min(labels, max(1, elements // vocabulary)) for elements in (CHUNK_ELEMENTS, SOFTMAX_ELEMENTS))
    return Term(
        "logits of one chunk",
        vocabulary * (rows * item + few * 8),
        "V * (min(n, 2^25 / V) * c + min(n, 2^19 / V) * 8)",
    )


def allocator(comes_and_goes: Iterable[Term]) -> Term:
    """The holes that glibc's heap has between activations; `kernels.cpu.allocator` keeps them for the next step."""
    kept = sum(term.bytes for term in comes_and_goes) * ALLOCATOR_PERCENT // 100
    return Term("holes in the heap", kept, f"{ALLOCATOR_PERCENT} % of activations, logits and gradients in flight")


def calibration_length(config: Mapping[str, Any]) -> int:
    """Tokens in a sequence of calibration text: 512, or the model's context where that is shorter."""
    context = config.get("max_position_embeddings") or config.get("n_positions") or CALIBRATION_CHUNK
    return min(CALIBRATION_CHUNK, int(context))


def usual_lanes(threads: int, item: int) -> int:
    """How many micro-batches of text a tuning runs side by side by default.

    Two where products are so cheap that what threads wait for in a shared one counts, in bf16 on matrix tiles: a third
    or more faster. Elsewhere they gain next to nothing and hold a tenth more (benchmarks/NOTES.md).

    Args:
        threads: of the tuning.
        item: bytes of a number in the compute dtype.
    """
    return min(2, threads) if item == 2 and has_tiles() else 1


def compute_bytes(compute: Literal["auto", "bf16", "fp32"], device: str) -> int:
    """Bytes of a number in the compute dtype, as `kernels.runtime` will choose it, found out without torch."""
    if compute != "auto":
        return {"bf16": 2, "fp32": 4}[compute]
    if device.startswith(("cuda", "xpu")):
        return 2
    return 2 if device != "mps" and multiplies_bf16() else 4
