import random
import statistics

import numpy as np
import pytest

from offsite.evaluation import intervals as bootstrap
from offsite.evaluation.intervals import Interval, interval, paired_interval, share_interval


def test_two_rows_by_hand():
    """Of rows 0 and 1 the mean is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4."""
    assert interval([0, 1]) == Interval(0.0, 1.0)
    assert interval([0, 1], level=0.4) == Interval(0.5, 0.5)
    assert interval([3, 3, 3]) == Interval(3.0, 3.0)


def test_a_ratio_is_of_sums_and_not_a_mean_of_ratios():
    """Rows (1 of 1) and (0 of 3): sums give 1, 1/4 and 0; the mean of ratios would give 1/2 in the middle."""
    assert interval([1, 0], [1, 3], level=0.4) == Interval(0.25, 0.25)
    assert interval([1, 0], [1, 3]) == Interval(0.0, 1.0)


def test_an_independent_implementation_agrees():
    """Plain Python, another generator, the same distribution."""
    numbers = random.Random(1)
    nats = [numbers.gauss(40, 9) for _ in range(60)]
    tokens = [numbers.randint(5, 30) for _ in range(60)]
    ratios = []
    for _ in range(4000):
        drawn = [numbers.randrange(60) for _ in range(60)]
        ratios.append(sum(nats[i] for i in drawn) / sum(tokens[i] for i in drawn))
    cuts = statistics.quantiles(ratios, n=40)
    found = interval(nats, tokens, resamples=4000)
    spread = cuts[-1] - cuts[0]
    assert found.low == pytest.approx(cuts[0], abs=0.05 * spread)
    assert found.high == pytest.approx(cuts[-1], abs=0.05 * spread)


def test_the_interval_covers():
    """95 % intervals of 400 data sets from a known distribution hold the truth about 95 times in 100."""
    generator = np.random.default_rng(7)
    covered = 0
    for i in range(400):
        tokens = generator.integers(1, 20, 80)
        nats = generator.gamma(2.0, tokens / 2)  # E[nats] = tokens: the ratio is 1
        found = interval(nats, tokens, resamples=400, seed=i)
        covered += found.low <= 1 <= found.high
    assert 0.91 <= covered / 400 <= 0.98


def test_it_is_a_function_of_its_arguments():
    rows = np.random.default_rng(0).normal(size=50)
    assert interval(rows) == interval(list(rows))
    assert interval(rows) != interval(rows, seed=1)
    assert paired_interval(rows, rows + 1) == paired_interval(rows, rows + 1)


def test_how_much_is_drawn_at_once_does_not_matter(monkeypatch):
    rows = np.random.default_rng(0).normal(size=50)
    together = interval(rows)
    monkeypatch.setattr(bootstrap, "PLACES_AT_ONCE", 500)
    assert interval(rows) == together


def test_pairs_share_what_makes_a_row_hard():
    generator = np.random.default_rng(0)
    hard = generator.gamma(2.0, 20.0, 300)
    one, other = hard + generator.normal(1.0, 0.5, 300), hard + generator.normal(0.0, 0.5, 300)
    apart = interval(one)
    paired = paired_interval(one, other)
    assert paired.high - paired.low < 0.1 * (apart.high - apart.low)
    assert 0.8 < paired.low < one.mean() - other.mean() < paired.high < 1.2
    mirrored = paired_interval(other, one)
    assert (mirrored.low, mirrored.high) == pytest.approx((-paired.high, -paired.low))
    assert paired_interval(one, one) == Interval(0.0, 0.0)


def test_the_paired_difference_takes_each_models_own_sizes():
    parts, sizes = [2.0, 2.0], [1.0, 1.0]
    assert paired_interval(parts, parts, sizes, [2.0, 2.0]) == Interval(1.0, 1.0)
    assert paired_interval(parts, parts, sizes) == Interval(0.0, 0.0)


def test_the_paired_interval_covers():
    generator = np.random.default_rng(3)
    covered = 0
    for i in range(300):
        hard = generator.gamma(1.0, 5.0, 60)
        found = paired_interval(hard + generator.normal(0.2, 1, 60), hard, resamples=400, seed=i)
        covered += found.low <= 0.2 <= found.high
    assert 0.9 <= covered / 300 <= 0.98


def test_one_row_says_nothing():
    assert interval([1.0]) is None
    assert interval([]) is None
    assert paired_interval([1.0], [2.0]) is None


def test_rows_must_match():
    with pytest.raises(ValueError, match="2 and 3"):
        paired_interval([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="1 denominators"):
        interval([1, 2], [1])


def test_a_share_is_taken_over_the_same_rows():
    draw = np.random.default_rng(0)
    hard = draw.normal(3, 1, 200)  # what makes a row hard for all three
    sizes = [1.0] * 200
    zero, whole = (list(hard), sizes), (list(hard - 1 + draw.normal(0, 0.05, 200)), sizes)
    half = (list(hard - 0.5 + draw.normal(0, 0.05, 200)), sizes)
    ends = share_interval(zero, whole, half)
    assert ends is not None
    assert 0.47 < ends.low < 0.5 < ends.high < 0.53
    assert share_interval(zero, whole, half) == ends
    assert share_interval(zero, whole, zero).high == 0.0
    assert share_interval(zero, whole, whole) == Interval(1.0, 1.0)


def test_a_share_of_nothing_has_no_interval():
    draw = np.random.default_rng(0)
    sizes = [1.0] * 50
    zero, same = (list(draw.normal(0, 1, 50)), sizes), (list(draw.normal(0, 1, 50)), sizes)
    assert share_interval(zero, same, zero) is None
    assert share_interval(([1.0], [1.0]), ([0.5], [1.0]), ([0.7], [1.0])) is None
    with pytest.raises(ValueError, match="paired rows"):
        share_interval(zero, ([1.0], [1.0]), zero)
