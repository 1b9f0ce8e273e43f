import numpy as np
import pytest

from offsite.data.batches import collate, micro_batches, step_batches
from offsite.data.examples import Example


def examples_of(lengths):
    return [Example(i, np.arange(length), 1) for i, length in enumerate(lengths)]


def test_an_epoch_sees_every_row_once_in_an_order_of_its_own():
    examples = examples_of(np.random.default_rng(0).integers(2, 60, 101))
    epochs = [step_batches(examples, rows=8, seed=3, epoch=epoch) for epoch in (0, 1)]
    for batches in epochs:
        assert sorted(row for batch in batches for row in batch) == list(range(101))
        assert sum(len(batch) != 8 for batch in batches) == 1
    assert epochs[0] != epochs[1]
    assert epochs[0] == step_batches(examples, rows=8, seed=3, epoch=0)
    assert epochs[0] != step_batches(examples, rows=8, seed=4, epoch=0)


def test_a_step_holds_rows_of_similar_length():
    examples = examples_of(np.random.default_rng(0).integers(2, 500, 512))
    batches = step_batches(examples, rows=16, seed=0, epoch=0)
    padded = sum(max(len(examples[i].ids) for i in batch) * len(batch) for batch in batches)
    assert padded < 1.06 * sum(len(example.ids) for example in examples)


def test_micro_batches_keep_the_budget():
    examples = examples_of([5, 30, 9, 100, 7, 31])
    groups = list(micro_batches(examples, [0, 1, 2, 3, 4, 5], 64))
    assert groups == [[0, 4, 2], [1, 5], [3]]  # 3 x 9, 2 x 31, and the long one alone


def test_rows_run_apart_where_padding_would_cost_more_than_another_pass():
    examples = examples_of([20] * 12 + [60] * 2)
    assert [len(group) for group in micro_batches(examples, range(14), 4096)] == [12, 2]  # 12 x 40 less
    examples = examples_of([20] * 12 + [24] * 2)
    assert [len(group) for group in micro_batches(examples, range(14), 4096)] == [14]  # 12 x 4 less


def test_micro_batches_of_a_step_are_alike():
    examples = examples_of([100] * 16)
    assert [len(group) for group in micro_batches(examples, range(16), 1000)] == [8, 8]  # and not 10 and 6


@pytest.mark.parametrize("budget", [50, 200, 1000])
def test_micro_batches_are_the_cheapest_cut(budget):
    sizes = sorted(np.random.default_rng(budget).integers(5, 90, 9).tolist())
    examples = examples_of(sizes)

    def cost(cuts):
        padded = [max(sizes[i] for i in group) * len(group) for group in cuts]
        if any(tokens > budget and len(group) > 1 for tokens, group in zip(padded, cuts, strict=True)):
            return float("inf")
        return sum(tokens + 128 * (1 + 0.5 * (tokens / budget) ** 2) for tokens in padded)

    found = list(micro_batches(examples, range(9), budget))
    assert [row for group in found for row in group] == list(range(9))
    ways = (
        np.split(np.arange(9), [at for at in range(1, 9) if bits >> (at - 1) & 1]) for bits in range(2**8)
    )  # every cut of nine rows
    assert cost(found) == pytest.approx(min(map(cost, ways)))


def test_labels_stand_where_their_predecessor_is():
    rows = [Example(1, np.array([7, 8, 9, 2]), 2), Example(2, np.array([7, 5]), 1)]
    batch = collate(rows)
    assert batch.ids.tolist() == [[7, 8, 9], [7, 0, 0]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.places.tolist() == [1, 2, 3]
    assert batch.targets.tolist() == [9, 2, 5]
    assert batch.owners.tolist() == [0, 0, 1]
