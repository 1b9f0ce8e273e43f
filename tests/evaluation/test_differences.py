import pytest

from offsite.evaluation.differences import FEWEST_ROWS, largest_differences, metric_differences
from offsite.evaluation.intervals import paired_interval
from offsite.evaluation.row_scores import RowScores


def scores(nats: list[float], right: list[float] | None = None, tokens: list[float] | None = None) -> RowScores:
    count = len(nats)
    right = right or []
    return RowScores(tuple(range(1, count + 1)), tuple(nats), tuple(tokens or [2.0] * count), tuple(right), ())


def test_a_difference_on_every_row_is_better_or_worse() -> None:
    first, other = scores([4.0 + i for i in range(8)]), scores([3.0 + 1.1 * i for i in range(8)])
    (found,) = metric_differences("other", other, first)
    assert found.value == pytest.approx((sum(other.nats) - sum(first.nats)) / 16)
    assert found.interval == paired_interval(other.nats, first.nats, first.tokens)
    assert (found.verdict, found.better, found.worse, found.equal) == ("better", 8, 0, 0)
    (found,) = metric_differences("first", first, other)
    assert (found.verdict, found.better, found.worse) == ("worse", 0, 8)


def test_a_difference_of_both_signs_is_noise() -> None:
    first, other = scores([4.0] * 8), scores([3.0, 5.1] * 4)
    (found,) = metric_differences("other", other, first)
    assert found.value > 0
    assert (found.verdict, found.better, found.worse) == ("noise", 4, 4)


@pytest.mark.parametrize(("differing", "verdict"), [(0, "equal"), (FEWEST_ROWS - 1, "too few rows"), (20, "better")])
def test_too_few_rows_say_nothing(differing: int, verdict: str) -> None:
    """Whatever the bootstrap says: of one row that differs it would say that the difference is certain."""
    first, other = scores([4.0] * 20), scores([3.0] * differing + [4.0] * (20 - differing))
    (found,) = metric_differences("other", other, first)
    assert found.verdict == verdict


def test_accuracy_counts_right_answers() -> None:
    first, other = scores([1.0] * 10, [0.0] * 10), scores([1.0] * 10, [1.0] * 9 + [0.0])
    loss, accuracy = metric_differences("other", other, first)
    assert (loss.metric, loss.verdict) == ("loss", "equal")
    assert (accuracy.metric, accuracy.verdict, accuracy.value) == ("accuracy", "better", 0.9)
    assert (accuracy.better, accuracy.worse, accuracy.equal) == (9, 0, 1)


def test_of_other_tokenizers_the_first_counts() -> None:
    """Both sums of nats over the same number of tokens: else more tokens of the same text would look better."""
    first, other = scores([4.0] * 8, tokens=[2.0] * 8), scores([4.0] * 8, tokens=[4.0] * 8)
    assert other.loss < first.loss
    (found,) = metric_differences("other", other, first)
    assert (found.value, found.verdict) == (0.0, "equal")


def test_rows_that_differ_most_come_first() -> None:
    first, other = scores([4.0, 4.0, 4.0, 4.0]), scores([4.5, 4.0, 1.0, 6.0])
    found = largest_differences("other", other, first, 2, {(None, 3): "the third row"})
    assert [(row.line, row.first_loss, row.loss, row.nats) for row in found] == [
        (3, 2.0, 0.5, -3.0),
        (4, 2.0, 3.0, 2.0),
    ]
    assert [row.text for row in found] == ["the third row", None]
    assert len(largest_differences("other", other, first, 9, {})) == 3  # the row without a difference is left out
