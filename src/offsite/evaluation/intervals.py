"""Confidence intervals by resampling rows: percentile bootstrap of ratios of sums (Efron and Tibshirani, 1993, ch. 13).

Every metric is a ratio of sums over the rows of a data set: nats over labelled tokens, or right answers over questions.
Whole rows are drawn with replacement, since the tokens within a row are not independent of each other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 1000
LEVEL = 0.95
PLACES_AT_ONCE = 2**22  # number of row indices that are drawn at a time: 32 MiB

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """The lower and upper end of a confidence interval."""

    low: float
    high: float


def interval(
    parts: Sequence[float],
    sizes: Sequence[float] | None = None,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval | None:
    """Compute the bootstrap interval of sum(parts) / sum(sizes) over rows. The result depends only on the arguments.

    Args:
        parts: the numerator's term for each row, (N,): nats, or 1 for a right answer and 0 for a wrong one.
        sizes: the denominator's term for each row, (N,), positive, such as its labelled tokens; None means 1 each, so
            the metric is a mean.
        resamples: the number of resampled data sets.
        level: the share of the resampled ratios inside the interval; equal shares lie below and above it.
        seed: the seed of the random draws.

    Returns:
        The interval, or None if there are fewer than two rows, since one row does not show how much rows vary.
    """
    return _percentiles(_resampled([_table(parts, sizes)], resamples, seed), level)


def paired_interval(
    parts: Sequence[float],
    other_parts: Sequence[float],
    sizes: Sequence[float] | None = None,
    other_sizes: Sequence[float] | None = None,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval | None:
    """Compute the interval of the difference between two models' metrics on the same rows.

    Both models use the same resampled rows, so the difficulty of a row, which both share, cancels. The interval is much
    narrower than if the two models were resampled separately.

    Args:
        parts: the first model's numerators, (N,), as for `interval`.
        other_parts: the second model's numerators, (N,), for the same rows in the same order.
        sizes: the denominators, (N,), as for `interval`.
        other_sizes: the second model's denominators if they differ (another tokenizer), (N,); None means `sizes`.
        resamples: the number of resampled data sets.
        level: the share of the resampled differences inside the interval.
        seed: the seed of the random draws.

    Returns:
        The interval, or None if there are fewer than two rows.

    Raises:
        ValueError: the two models have different numbers of rows.
    """
    tables = [_table(parts, sizes), _table(other_parts, other_sizes if other_sizes is not None else sizes)]
    return _percentiles(_resampled(tables, resamples, seed), level)


def share_interval(
    zero: tuple[Sequence[float], Sequence[float]],
    whole: tuple[Sequence[float], Sequence[float]],
    reached: tuple[Sequence[float], Sequence[float]],
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval | None:
    """Compute the interval of (reached - zero) / (whole - zero): one model's metric on a scale given by two others.

    All three are computed on the same rows. For example, the share of full fine-tuning's gain (`whole`) over zero-shot
    (`zero`) that a plug-in (`reached`) has.

    Args:
        zero: numerators and denominators for each row, (N,) each, of the model that counts as 0.
        whole: numerators and denominators of the model that counts as 1.
        reached: numerators and denominators of the model whose share is computed.
        resamples: the number of resampled data sets.
        level: the share of the resampled values inside the interval.
        seed: the seed of the random draws.

    Returns:
        The interval; None if there are fewer than two rows, or if `whole - zero` changes its sign among the resamples,
        since the share then has no finite interval.
    """
    tables = [_table(*one) for one in (zero, whole, reached)]
    if _rows(tables) < 2:
        return None
    low, high, middle = np.concatenate(list(_draws(tables, resamples, seed)), axis=1)  # (B,) each
    gained = high - low
    if gained.min() <= 0 <= gained.max():
        return None
    return _percentiles((middle - low) / gained, level)


def _table(parts: Sequence[float], sizes: Sequence[float] | None) -> Floats:
    """One array (2, N) for a metric on N rows: the numerators `parts`, then the denominators `sizes` (None: all 1)."""
    numerators = np.asarray(parts, dtype=np.float64)
    denominators = np.ones_like(numerators) if sizes is None else np.asarray(sizes, dtype=np.float64)
    if numerators.shape != denominators.shape:
        raise ValueError(f"{len(numerators)} numerators, but {len(denominators)} denominators")
    return np.stack([numerators, denominators])  # (2, N)


def _resampled(tables: Sequence[Floats], resamples: int, seed: int) -> Floats | None:
    """The metric of each resampled data set, (resamples,); for two tables the first metric minus the second.

    None if there are fewer than two rows.

    Args:
        tables: one or two arrays of `_table`, (2, N): numerators, then denominators, of the same N rows.
        resamples: the number of resampled data sets.
        seed: the seed of the random draws.
    """
    if _rows(tables) < 2:
        return None
    ratios = np.concatenate(list(_draws(tables, resamples, seed)), axis=1)
    drawn: Floats = ratios[0] if len(ratios) == 1 else ratios[0] - ratios[1]
    return drawn


def _rows(tables: Sequence[Floats]) -> int:
    """The number N of rows of the data set, which must be the same in every table of `_table`, (2, N).

    Raises:
        ValueError: two tables have different N.
    """
    rows = int(tables[0].shape[1])
    if any(table.shape[1] != rows for table in tables):
        raise ValueError(f"paired rows: {' and '.join(str(table.shape[1]) for table in tables)}")
    return rows


def _draws(tables: Sequence[Floats], resamples: int, seed: int) -> Iterator[Floats]:
    """Yields arrays with the metric of every table for some of the resampled data sets: (tables, these data sets).

    Together they have `resamples` columns. A table is an array of `_table`, (2, N): numerators, then denominators.
    """
    generator = np.random.default_rng(seed)
    rows = tables[0].shape[1]
    at_once = max(1, PLACES_AT_ONCE // rows)
    for begin in range(0, resamples, at_once):
        drawn = generator.integers(rows, size=(min(at_once, resamples - begin), rows))  # (b, N)
        ratios = []
        for table in tables:
            parts, sizes = (side[drawn].sum(axis=1) for side in table)  # (b,) each
            ratios.append(parts / sizes)
        yield np.stack(ratios)


def _percentiles(ratios: Floats | None, level: float) -> Interval | None:
    """The interval that contains the share `level` of the values `ratios`; None if these are None (too few rows)."""
    if ratios is None:
        return None
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
