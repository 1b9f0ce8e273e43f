"""Examples -> batches: examples of similar length run together, padded at the right.

The padding is known from the lengths of the examples, never from a token id, since many models pad with their EOS
token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from offsite.data.examples import Example

_SORTED_STEPS = 32  # number of steps whose examples are sorted by length together
_PASS = 128  # fixed cost of a pass, in tokens that take as long: 70 to 430 were measured


def step_batches(examples: Sequence[Example], *, rows: int, seed: int, epoch: int) -> list[list[int]]:
    """Group the examples into the optimiser steps of one epoch; each step is a list of indices into `examples`.

    The steps depend only on the arguments, so a resumed run repeats them. Examples are shuffled. Within each group of
    32 steps they are sorted by length and cut into steps, and then the order of all steps is shuffled: so there is
    little padding, and lengths show no trend over an epoch.

    Args:
        examples: all examples.
        rows: the number of examples of a step.
        seed: the seed of the shuffling.
        epoch: the number of the epoch; with the seed it decides the order.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(examples))
    batches: list[list[int]] = []
    for begin in range(0, len(order), rows * _SORTED_STEPS):
        together = sorted(order[begin : begin + rows * _SORTED_STEPS].tolist(), key=lambda i: len(examples[i].ids))
        batches += [together[at : at + rows] for at in range(0, len(together), rows)]
    return [batches[i] for i in generator.permutation(len(batches))]


def micro_batches(examples: Sequence[Example], rows: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Cut the examples of a step into micro-batches of similar lengths, at the least total cost.

    A micro-batch costs its tokens (padding included) plus a constant for each pass (`_PASS`). A large micro-batch costs
    up to half of this constant more, so among cuts with equal padding the most even one is chosen: it needs the least
    memory at once.

    Args:
        examples: all examples.
        rows: the indices in `examples` of the step's examples.
        budget: the largest number of tokens (padding included) of a micro-batch; a longer example runs alone.

    Yields:
        The indices of the examples of each micro-batch, the shortest examples first.
    """
    order = sorted(rows, key=lambda i: (len(examples[i].ids), i))
    # costs[n]: least cost of the first n examples; begins[n]: where the last micro-batch of that cut begins
    costs, begins = np.zeros(len(order) + 1), np.zeros(len(order) + 1, dtype=np.int64)
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
    """Padded inputs for the network, and the positions of the labels.

    The last token of an example is never an input, only a label.
    """

    ids: npt.NDArray[np.int64]  # (B, T), padded at the right with 0
    mask: npt.NDArray[np.int64]  # (B, T), 1 for a token and 0 for padding
    places: npt.NDArray[np.int64]  # (L,) positions in the flattened batch (B * T) whose outputs predict a label
    targets: npt.NDArray[np.int64]  # (L,) token ids of the labels
    owners: npt.NDArray[np.int64]  # (L,) for each label the index of its example in the batch


def collate(examples: Sequence[Example]) -> Batch:
    """Pad examples to the same length, and list the positions and targets of their labels."""
    width = max(len(example.ids) for example in examples) - 1
    ids = np.zeros((len(examples), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    places, targets, owners = [], [], []
    for i, example in enumerate(examples):
        length = len(example.ids) - 1
        ids[i, :length] = example.ids[:-1]
        mask[i, :length] = 1
        places.append(i * width + example.labelled - 1)  # a label is predicted at the token before it
        targets.append(example.ids[example.labelled])
        owners.append(np.full(example.labels, i))
    return Batch(ids, mask, np.concatenate(places), np.concatenate(targets), np.concatenate(owners))
