"""Lists the rows of each step for a benchmark of `offsite tune` and its peers, which all train on the same rows.

    python -m benchmarks.steps '{"base": ..., "rows": ..., "whole": ..., "per_step": 16, "warmup": 1, "steps": 4}'

The rows are those that `offsite tune` takes under the cell's seed. As a command it prints the plan of one cell as a
line of JSON: the seed, and the numbers of rows, tokens and labels in the measured steps. It runs in a process of its
own, so that the process that starts the measurements stays small.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offsite.data.examples import Example

LENGTH = 1024  # `offsite tune`'s own limit
_SEEDS = 64


def main() -> None:
    """Print the plan of one cell, as a line of JSON.

    Of 64 seeds, the one is chosen whose measured steps have a mean row length closest to that of all rows.
    """
    wanted: dict[str, Any] = json.loads(sys.argv[1])
    base, count = Path(wanted["base"]), wanted["warmup"] + wanted["steps"]
    examples = encoded(base, Path(wanted["rows"]))
    mean = sum(map(_length, examples)) / len(examples)

    def on_the_clock(seed: int) -> "list[list[Example]]":
        return steps_of(examples, wanted["per_step"], count, seed)[wanted["warmup"] :]

    def distance(seed: int) -> float:
        found = [_length(example) for step in on_the_clock(seed) for example in step]
        return abs(sum(found) / len(found) - mean)

    seed = min(range(_SEEDS), key=distance)  # so the steps on the clock are like the data, and not only long or short
    steps = on_the_clock(seed)
    lengths = [_length(example) for step in steps for example in step]
    plan = {
        "seed": seed,
        "tokens": sum(lengths),
        "labels": sum(example.labels for step in steps for example in step),
        "rows": len(lengths),
        "squares": sum(length**2 for length in lengths),
        "longest": max(map(_length, encoded(base, Path(wanted["whole"])))),
        "padded": sum(_padded(step) for step in steps),
    }
    print(json.dumps(plan))


def encoded(base: Path, rows: Path) -> "tuple[Example, ...]":
    """Read and tokenise rows as `offsite tune` does; rows longer than 1,024 tokens are cut."""
    from offsite.data.read_rows import read_rows
    from offsite.data.tokens import encode
    from offsite.models.tokenizers import load_tokenizer

    return encode(read_rows(rows), load_tokenizer(base), source=rows, max_length=LENGTH, long_rows="truncate").examples


def steps_of(examples: "Sequence[Example]", per_step: int, count: int, seed: int) -> "list[list[Example]]":
    """The rows of the first steps of a tuning, a list for each step, sorted from short to long.

    Args:
        examples: the tokenised rows.
        per_step: the number of rows in a step.
        count: the number of steps.
        seed: the seed of the tuning.
    """
    from offsite.data.batches import step_batches

    per_epoch = -(-len(examples) // per_step)
    epochs = [
        step_batches(examples, rows=per_step, seed=seed, epoch=epoch) for epoch in range(1 + (count - 1) // per_epoch)
    ]
    steps = [step for epoch in epochs for step in epoch][:count]
    return [sorted((examples[row] for row in step), key=_length) for step in steps]


def _padded(step: "Sequence[Example]") -> int:
    """The number of tokens, including padding, that `offsite tune` runs for the rows of a step."""
    from offsite import TuneSpec
    from offsite.data.batches import micro_batches

    groups = micro_batches(step, range(len(step)), TuneSpec().tokens_at_once)
    return sum(len(group) * max(_length(step[i]) for i in group) for group in groups)


def _length(example: "Example") -> int:
    return len(example.ids)


if __name__ == "__main__":
    main()
