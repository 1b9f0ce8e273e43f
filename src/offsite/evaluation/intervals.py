"""Confidence intervals by resampling rows: percentile bootstrap of ratios of sums (Efron and Tibshirani, 1993, ch. 13).

Every measure here is a ratio of sums over rows: nats over labelled tokens, right answers over questions. Rows are drawn
with replacement as a whole, since the tokens of a row are not independent of each other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 1000
LEVEL = 0.95
PLACES_AT_ONCE = 2**22  # drawn row numbers that exist at once: 32 MiB

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """The ends of a confidence interval."""

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
    """The interval of sum(parts) / sum(sizes) over rows drawn anew; a function of the arguments alone.

    Args:
        parts: of each row, (N,): nats, or 1 for a right answer and 0 for a wrong one.
        sizes: of each row, (N,), positive: labelled tokens; None is 1 each, so that the ratio is a mean.
        resamples: how often rows are drawn.
        level: share of the resampled ratios inside; as many lie below as above.
        seed: of the draws.

    Returns:
        The ends, or None of fewer than two rows, which say nothing of how rows vary.
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
    """The interval of one model's ratio minus another's on the same rows.

    Both are taken over the same drawn rows, so what makes a row hard for both cancels: far narrower than what two
    separate intervals would say.

    Args:
        parts: of each row for the one model, (N,).
        other_parts: of the same rows, in the same order, for the other, (N,).
        sizes: as in `interval`, (N,).
        other_sizes: the other's, where they differ (another tokenizer), (N,); None takes `sizes`.
        resamples: how often rows are drawn.
        level: share of the resampled differences inside.
        seed: of the draws.

    Returns:
        The ends, or None of fewer than two rows.

    Raises:
        ValueError: the two are not of as many rows.
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
    """The interval of (reached - zero) / (whole - zero), each a ratio of sums over the same drawn rows.

    Args:
        zero: parts and sizes of each row, (N,) each, of what counts as nothing.
        whole: the same rows' of what counts as all.
        reached: the same rows' of what lies between, or beyond.
        resamples: how often rows are drawn.
        level: share of the resampled shares inside.
        seed: of the draws.

    Returns:
        The ends; None of fewer than two rows, or where a draw has nothing to share: `whole` is not surely on one side
        of `zero`, so the share has no finite interval.
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
    made = np.asarray(parts, dtype=np.float64)
    sized = np.ones_like(made) if sizes is None else np.asarray(sizes, dtype=np.float64)
    if made.shape != sized.shape:
        raise ValueError(f"{len(made)} rows, and sizes of {len(sized)}")
    return np.stack([made, sized])  # (2, N)


def _resampled(tables: Sequence[Floats], resamples: int, seed: int) -> Floats | None:
    """The ratio of the first table, minus that of the second if there is one, for each draw, (B,)."""
    if _rows(tables) < 2:
        return None
    ratios = np.concatenate(list(_draws(tables, resamples, seed)), axis=1)
    drawn: Floats = ratios[0] if len(ratios) == 1 else ratios[0] - ratios[1]
    return drawn


def _rows(tables: Sequence[Floats]) -> int:
    rows = int(tables[0].shape[1])
    if any(table.shape[1] != rows for table in tables):
        raise ValueError(f"paired rows: {' and '.join(str(table.shape[1]) for table in tables)}")
    return rows


def _draws(tables: Sequence[Floats], resamples: int, seed: int) -> Iterator[Floats]:
    """The ratio of every table for some draws at once, (tables, b)."""
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
    if ratios is None:
        return None
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
