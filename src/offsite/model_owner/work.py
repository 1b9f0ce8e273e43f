"""What is computed for the emulator's weights before they are stored."""

from collections.abc import Sequence
from dataclasses import dataclass

from offsite.config import PackSpec, RefitMap


@dataclass(frozen=True)
class Work:
    """What is computed for the emulator's weights before they are stored. Where nothing is lost, nothing is healed."""

    solves: tuple[RefitMap, ...]  # the maps that end attention or MLP and are solved anew, in this order
    prunes: float  # share of every matrix that SparseGPT takes away
    distills: bool
    maps: bool  # a map of the hidden state is solved for behind each kept block

    @property
    def block_by_block(self) -> bool:
        """Whether each block is changed in its turn, on what the blocks before it give."""
        return bool(self.solves) or self.maps or self.prunes > 0

    @property
    def refits(self) -> tuple[RefitMap, ...]:
        """The maps that refit goes through; one that ends the MLP and is only pruned comes last."""
        return self.solves if "mlp" in self.solves or not self.prunes else (*self.solves, "mlp")


def work_of(middle: Sequence[int], spec: PackSpec) -> Work:
    """What the settings ask for with a middle of these blocks."""
    prunes = spec.pruned if spec.compress.prune_by == "sparsegpt" else 0.0
    dropped = spec.kept(middle) < len(middle)
    lost = dropped or prunes > 0
    return Work(
        solves=spec.heal.refit_maps if "refit" in spec.heal.steps and lost else (),
        prunes=prunes,
        distills="distill" in spec.heal.steps and lost,
        maps="affine" in spec.heal.steps and dropped,
    )
