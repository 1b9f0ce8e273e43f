"""Pruning: exactly the share that was asked for, of exactly the emulator's matrices, and only the smallest."""

from pathlib import Path

import numpy as np
import pytest

from artifacts import packed
from offsite.models.families.architectures import ARCHITECTURES
from offsite.storage.checkpoint_folder import open_checkpoint
from offsite.storage.safetensors_files import read_float32
from tiny import FAMILIES, MakeBase, Parties, tiny_vision_base


@pytest.mark.parametrize("family", FAMILIES)
def test_the_smallest_numbers_of_each_emulator_matrix_are_zero(
    base_of: MakeBase, tmp_path: Path, parties: Parties, family: str
) -> None:
    base = base_of(family, 5)
    plain, sparse = (
        packed(base, tmp_path / str(ratio), parties, keep=3, prune=ratio, prune_by="magnitude", heal="none")
        for ratio in (0.0, 0.3)
    )
    family = ARCHITECTURES[plain.manifest.architecture]
    before, after = (open_checkpoint(one.folder).tensors for one in (plain, sparse))
    for name in before:
        old, new = read_float32(before[name]), read_float32(after[name])
        place = family.block_of(name)
        if place is None or place[0] not in (1, 2, 3) or place[1].removesuffix(".weight") not in family.linears:
            assert (old == new).all(), name
            continue
        gone = new == 0
        assert gone.sum() == int(0.3 * old.size), name
        assert (old[~gone] == new[~gone]).all()
        assert np.abs(old[gone]).max() <= np.abs(old[~gone]).min()


def test_a_router_and_tables_of_positions_stay_whole(base_of: MakeBase, tmp_path: Path, parties: Parties) -> None:
    bases = {
        "block_sparse_moe.gate.weight": base_of("mixtral", 3),
        "relative_position_bias_table": tiny_vision_base(tmp_path / "beit", "beit, relative positions", 3),
    }
    for part, base in bases.items():
        bundle = packed(base, tmp_path / part, parties, keep=1, prune=0.3, prune_by="magnitude", heal="none")
        held = {name: tensor for name, tensor in open_checkpoint(bundle.folder).tensors.items() if part in name}
        assert held
        assert all(read_float32(tensor).all() for tensor in held.values())
