"""Makes a base folder in shards with the shapes of Llama 2 and random bf16 weights, to measure memory and speed.

    python -m benchmarks.large_base 7b FOLDER --blocks 3

With fewer blocks the files are smaller, and each block and the head are as large as in the whole model.
"""

import argparse
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from benchmarks.hollow_base import COMMON, SIZES, shapes_of, write_settings

from offsite.storage.checkpoint_folder import write_checkpoint
from offsite.storage.safetensors_files import NewTensor

_CHUNK = 2**20  # values that are drawn at once
_SHARD_BYTES = 10**9
_SIGN_AND_FRACTION, _LEAST_EXPONENT = 0x807F, 119  # bits of bf16; magnitudes from 2^-8 to 2^-5


def main() -> None:
    """Write a base folder in the size that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=None, help="number of blocks, by default the model's")
    wanted = parser.parse_args()
    write_base(wanted.folder, wanted.size, wanted.blocks)


def write_base(folder: Path, size: str, blocks: int | None) -> None:
    """Write a base folder: a size from `SIZES`, and its number of blocks (None: the model's)."""
    config: dict[str, object] = COMMON | SIZES[size] | ({"num_hidden_layers": blocks} if blocks else {})
    write_settings(folder, config)
    draw = np.random.default_rng(0)
    tensors = [
        NewTensor(f"{name}.weight", "BF16", shape, partial(_values, draw, shape))
        for name, shape in shapes_of(config).items()
    ]
    write_checkpoint(folder, tensors, shard_bytes=_SHARD_BYTES)


def _values(draw: np.random.Generator, shape: tuple[int, ...]) -> Iterator[memoryview]:
    """Yield the bf16 values of a weight, random for a matrix and ones for a norm, a chunk at a time."""
    left = math.prod(shape)
    while left:
        count = min(_CHUNK, left)
        bits = draw.integers(0, 2**16, count, dtype=np.uint16)
        exponents = (_LEAST_EXPONENT + ((bits >> 7) & 3)) << 7
        values = (bits & _SIGN_AND_FRACTION) | exponents if len(shape) > 1 else np.full(count, 0x3F80, np.uint16)
        yield values.astype("<u2").data.cast("B")
        left -= count


if __name__ == "__main__":
    main()
