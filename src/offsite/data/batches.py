"""Examples -> batches: rows of similar length together, padded at the right.

Padding is known by length, never by id, since many models pad with their EOS.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from offsite.data.examples import Example

_SORTED_STEPS = 32  # steps whose rows are sorted by length together
_PASS = 128  # padded tokens that take as long as what a pass costs beside them: 70 to 430 were measured


def step_batches(examples: Sequence[Example], *, rows: int, seed: int, epoch: int) -> list[list[int]]:
    """The rows of every step of one epoch, a function of the arguments alone, so a resumed run finds its place.

    Rows are shuffled; within runs of 32 steps they are sorted by length and cut into steps, whose order is shuffled
    again: little padding, and over an epoch no trend in length.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(examples))
    batches: list[list[int]] = []
    for begin in range(0, len(order), rows * _SORTED_STEPS):
        together = sorted(order[begin : begin + rows * _SORTED_STEPS].tolist(), key=lambda i: len(examples[i].ids))
        batches += [together[at : at + rows] for at in range(0, len(together), rows)]
    return [batches[i] for i in generator.permutation(len(batches))]


def micro_batches(examples: Sequence[Example], rows: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Cut rows, similar lengths together, into the groups that cost least.

    A group costs its padded tokens and what every pass costs (`_PASS`), a full one half as much of that again: of cuts
    that pad alike the evenest holds the least memory at once.

    Args:
        examples: that `rows` count.
        rows: to cut.
        budget: most padded tokens of a group; a longer row goes alone.
    """
    order = sorted(rows, key=lambda i: (len(examples[i].ids), i))
    costs, begins = np.zeros(len(order) + 1), np.zeros(len(order) + 1, dtype=np.int64)  # of the first so many rows
    for end in range(1, len(order) + 1):
        width = len(examples[order[end - 1]].ids)
        begin = np.arange(max(0, end - max(1, budget // width)), end)
        padded = width * (end - begin)
        cost = costs[begin] + padded + _PASS * (1 + 0.5 * (padded / budget) ** 2)
        costs[end], begins[end] = cost.min(), begin[cost.argmin()]
    groups, end = [], len(order)
    while end:
        groups.append(order[begins[end] : end])
        end = int(begins[end])
    yield from reversed(groups)


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded inputs and where the labels are; the last token of a row is never an input, only a label."""

    ids: npt.NDArray[np.int64]  # (B, T), padded at the right with 0
    mask: npt.NDArray[np.int64]  # (B, T), 1 where a token is
    places: npt.NDArray[np.int64]  # (L,) flat positions in B*T whose outputs predict a label
    targets: npt.NDArray[np.int64]  # (L,) the labels
    owners: npt.NDArray[np.int64]  # (L,) row in the batch of each label


def collate(examples: Sequence[Example]) -> Batch:
    """Pad examples to one rectangle and list their labelled positions."""
    width = max(len(example.ids) for example in examples) - 1
    ids = np.zeros((len(examples), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    places, targets, owners = [], [], []
    for i, example in enumerate(examples):
        length = len(example.ids) - 1
        ids[i, :length] = example.ids[:-1]
        mask[i, :length] = 1
        places.append(i * width + example.labelled - 1)  # the token before predicts
        targets.append(example.ids[example.labelled])
        owners.append(np.full(example.labels, i))
    return Batch(ids, mask, np.concatenate(places), np.concatenate(targets), np.concatenate(owners))
