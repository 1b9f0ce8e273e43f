"""Clusters of blocks: CKA against its formula, and merging by hand."""

from pathlib import Path

import pytest
import torch

from offsite.config import PackSpec
from offsite.model_owner.base_model import open_base
from offsite.model_owner.partition import partition
from offsite.model_owner.select.cluster import centres, linear_cka
from offsite.model_owner.select.select_blocks import select_blocks
from offsite.progress import silent
from offsite.protocol.artifacts import Base
from tiny import MakeBase


def test_cka_is_the_formula() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(12, 5) + 3, torch.randn(12, 7)
    x, y = (left - left.mean(0)).double(), (right - right.mean(0)).double()
    expected = (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    assert linear_cka(left, right) == pytest.approx(float(expected))
    rotated = left @ torch.linalg.qr(torch.randn(5, 5))[0]
    assert linear_cka(left, 7 * rotated + 2) == pytest.approx(1)
    assert 0 < linear_cka(left, right) < 1


def test_neighbours_merge_by_their_mean_likeness() -> None:
    likeness = {(0, 1): 0.9, (1, 2): 0.1, (2, 3): 0.5, (3, 4): 0.6, (2, 4): 0.7, (0, 2): 0.99}
    alike = [[1.0 if i == j else likeness.get((min(i, j), max(i, j)), 0.0) for j in range(5)] for i in range(5)]
    # 0 and 1 first; 3 and 4 next; then 2 with them (mean of .5 and .7), for (0, 1) and 2 are .545
    assert centres(alike, 5) == [0, 1, 2, 3, 4]
    assert centres(alike, 3) == [0, 2, 3]
    assert centres(alike, 2) == [0, 3]
    assert centres(alike, 1) == [2]


def test_as_many_centres_as_blocks_to_keep(base_of: MakeBase, tmp_path: Path) -> None:
    model = open_base(Base(base_of(blocks=7)))
    spec = PackSpec(bottom=1, top=1, keep=3, select="cluster", calibration_tokens=1024, compute="fp32", threads=1)
    found = select_blocks(model, partition(model, spec), spec, tmp_path, silent)
    assert len(found) == 3
    assert set(found) <= set(range(1, 6))
    assert list(found) == sorted(found)
    (tmp_path / "again").mkdir()
    assert found == select_blocks(model, partition(model, spec), spec, tmp_path / "again", silent)
