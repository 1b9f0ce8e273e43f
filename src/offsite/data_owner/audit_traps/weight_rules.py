"""Rules on the weights of trained blocks, against robust statistics of the same layer and of the same layer elsewhere.

Each limit is at least twice what was found in the 30 blocks of SmolLM2-135M, and rises with what other blocks of the
same bundle have in the same layer, since honest models differ.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offsite.data_owner.audit_traps.findings import Finding, finding

EXTREME = 1_000.0  # largest weight, in units of the median weight of its matrix
ROW_NORM = 16.0  # largest norm of a row, in units of the median
VECTOR = 200.0  # largest value of a bias or norm, in units of its median
EMBEDDING = 10.0  # largest norm of an embedding, in units of the median
_SINGLE = 1.02  # a row with fewer effective inputs reads one input
_EQUAL = 0.99999  # rows with a larger absolute cosine are equal up to a factor
_LOW = 0.03  # an effective rank below this share of other blocks' is low
_MARGIN = 2.0  # a value may be this many times the largest in other blocks
_FEWEST = 8  # matrices with fewer rows or inputs are not judged by their rows


@dataclass(frozen=True)
class MatrixFigures:
    """Figures of one matrix, (R, F)."""

    broken: int  # number of NaN and infinite values; the other figures then are of the finite ones
    extreme: float  # largest absolute value in units of the median of those that are not zero
    norms: Tensor  # (R,) norms of the rows in units of the median norm
    inputs: Tensor  # (R,) effective number of inputs of each row; infinite for a zero row
    twins: list[int]  # rows that equal another row up to a factor
    dead: list[int]  # rows of zeros
    rank: float | None  # effective rank (sum s^2)^2 / sum s^4 over singular values s; None: not computed


def figures_of(weight: Tensor, *, quick: bool) -> MatrixFigures:
    """Compute the figures of a matrix (R, F) in float32; `quick` leaves out twins and rank, which take products."""
    finite = torch.isfinite(weight)
    broken = int((~finite).sum())
    matrix = torch.where(finite, weight, 0.0) if broken else weight
    size = matrix.abs()
    used = size[size > 0]
    norms = matrix.norm(dim=1)
    alive = norms > 0
    unit = norms[alive].median() if bool(alive.any()) else norms.new_tensor(1.0)
    scaled = matrix / norms.clamp_min(1e-30)[:, None]
    inputs = torch.where(alive, 1 / scaled.square().square().sum(dim=1).clamp_min(1e-30), math.inf)
    twins: list[int] = []
    rank = None
    if not quick and min(matrix.shape) >= _FEWEST:
        cosines = (scaled @ scaled.T).abs().fill_diagonal_(0)
        twins = (cosines.amax(dim=1) > _EQUAL).nonzero().flatten().tolist()
        gram = matrix @ matrix.T if len(matrix) < matrix.shape[1] else matrix.T @ matrix
        rank = float(gram.trace().square() / gram.square().sum().clamp_min(1e-30))
    return MatrixFigures(
        broken,
        float(size.max() / used.median()) if used.numel() else 0.0,
        norms / unit,
        inputs,
        twins,
        (~alive).nonzero().flatten().tolist(),
        rank,
    )


def matrix_findings(place: str, found: MatrixFigures, others: Sequence[MatrixFigures]) -> Iterator[Finding]:
    """Yield the findings about a matrix.

    Args:
        place: the name of the matrix, for the findings.
        found: its figures.
        others: the figures of the same layer in other blocks.
    """
    if found.broken:
        yield Finding("not finite", place, found.broken, math.inf, 0.0)
    limit = max(EXTREME, _MARGIN * max((one.extreme for one in others), default=0.0))
    if found.extreme > limit:
        yield Finding("extreme weight", place, 1, found.extreme, limit)
    if len(found.norms) < _FEWEST:
        return
    limit = max(ROW_NORM, _MARGIN * max((float(one.norms.max()) for one in others), default=0.0))
    far = (found.norms > limit).nonzero().flatten().tolist()
    if far:
        yield finding("row norm", place, far, float(found.norms.max()), limit)
    single = (found.inputs < _SINGLE).nonzero().flatten().tolist()
    if single and len(single) > max((int((one.inputs < _SINGLE).sum()) for one in others), default=0):
        yield finding("single input", place, single, float(found.inputs.min()), _SINGLE)
    if len(found.twins) > _MARGIN * max((len(one.twins) for one in others), default=0):
        yield finding("duplicate rows", place, found.twins, 1.0, _EQUAL)
    usual = max((len(one.dead) for one in others), default=0)
    if len(found.dead) > _MARGIN * usual:
        yield finding("dead rows", place, found.dead, float(len(found.dead)), float(usual))
    ranks = sorted(one.rank for one in others if one.rank is not None)
    if found.rank is not None and ranks and found.rank < _LOW * ranks[len(ranks) // 2]:
        yield Finding("low rank", place, 1, found.rank, ranks[len(ranks) // 2])


def vector_findings(place: str, values: Tensor, others: Sequence[Tensor]) -> Iterator[Finding]:
    """Yield the findings about a bias or the weight of a norm.

    Args:
        place: its name, for the findings.
        values: its values.
        others: the same vector in other blocks.
    """
    broken = int((~torch.isfinite(values)).sum())
    if broken:
        yield Finding("not finite", place, broken, math.inf, 0.0)
    if values.numel() < _FEWEST:
        return
    spread = _spread(values)
    limit = max(VECTOR, _MARGIN * max((float(_spread(one).max()) for one in others), default=0.0))
    far = (spread > limit).nonzero().flatten().tolist()
    if far:
        yield finding("vector", place, far, float(spread.max()), limit)


def embedding_findings(weight: Tensor) -> Iterator[Finding]:
    """Yield the findings about the embeddings of tokens (V, H)."""
    broken = int((~torch.isfinite(weight)).sum())
    if broken:
        yield Finding("not finite", "embeddings", broken, math.inf, 0.0)
    norms = weight.float().nan_to_num(0.0, 0.0, 0.0).norm(dim=1)
    unit = norms.median().clamp_min(1e-30)
    far = (norms / unit > EMBEDDING).nonzero().flatten().tolist()
    if far:
        yield finding("embedding norm", "embeddings", far, float(norms.max() / unit), EMBEDDING, far)


def _spread(values: Tensor) -> Tensor:
    """The absolute values in units of their median, of the finite ones that are not zero."""
    size = values.float().nan_to_num(0.0, 0.0, 0.0).abs()
    used = size[size > 0]
    return size / used.median() if used.numel() else size
