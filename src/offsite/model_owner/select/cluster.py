"""Selection by clusters of similar blocks (CRaSh, arXiv 2310.15477, section 3.2): one block of each cluster is kept.

Blocks are compared by linear CKA (Kornblith et al., arXiv 1905.00414, equation 4) between their outputs, averaged over
each sample's tokens. Tokens are normalised before averaging, and the first token of a sample is left out: a few tokens
have a norm a thousand times larger than the others and would dominate.
"""

from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor
from torch.nn import functional as F

from offsite.kernels.runtime import resolve_runtime
from offsite.model_owner.block_runner import BlockRunner
from offsite.model_owner.calibration.calibration_batches import calibration_batches
from offsite.model_owner.calibration.calibration_text import row_form
from offsite.model_owner.select.selection_protocol import Selection
from offsite.progress import Event


def select(selection: Selection) -> tuple[int, ...]:
    """The base indices of the kept blocks: the middle block of each cluster; there is one cluster per kept block.

    Raises:
        DataError: the calibration data is unreadable or too short.
    """
    pooled = _pooled_outputs(selection)
    alike = [[linear_cka(one, other) for other in pooled] for one in pooled]
    return tuple(selection.middle[place] for place in centres(alike, selection.keep))


def linear_cka(left: Tensor, right: Tensor) -> float:
    """Linear CKA between features (n, p) and (n, q) of the same n samples, computed from their Gram matrices (n, n)."""
    left, right = left.double() - left.double().mean(0), right.double() - right.double().mean(0)
    grams = left @ left.T, right @ right.T
    return float((grams[0] * grams[1]).sum() / (grams[0].norm() * grams[1].norm()).clamp_min(1e-12))


def centres(alike: Sequence[Sequence[float]], keep: int) -> list[int]:
    """Merge neighbouring clusters of blocks until `keep` clusters remain; at first, each block is its own cluster.

    Each step merges the two neighbours with the highest average similarity between their members.

    Args:
        alike: the similarity of every pair of blocks, in the order of the blocks.
        keep: number of clusters.

    Returns:
        The position in `alike` of each cluster's middle block, or of the earlier of two middle blocks.
    """
    clusters = [[place] for place in range(len(alike))]
    while len(clusters) > keep:
        likeness = [
            fmean(alike[i][j] for i in clusters[at] for j in clusters[at + 1]) for at in range(len(clusters) - 1)
        ]
        at = max(range(len(likeness)), key=likeness.__getitem__)
        clusters[at : at + 2] = [clusters[at] + clusters[at + 1]]
    return [members[(len(members) - 1) // 2] for members in clusters]


def _pooled_outputs(selection: Selection) -> list[Tensor]:
    """The outputs of each block of the middle for the calibration samples, averaged over tokens: (samples, H) each."""
    model, spec, middle = selection.model, selection.spec, selection.middle
    machine = resolve_runtime(spec.runtime.device, spec.runtime.compute, spec.runtime.threads)
    runner = BlockRunner(model, machine)
    batches = [
        ids.to(machine.device)
        for ids in calibration_batches(model, spec.calibration.source, spec.calibration.tokens, row_form(spec))
    ]
    first = runner.load(0)
    hidden = [first.embed(ids) for ids in batches]
    pooled = []
    for index in range(middle[-1] + 1):
        selection.progress(Event("comparing blocks", index, middle[-1] + 1))
        block = runner.load(index)
        for position, ids in enumerate(batches):
            hidden[position] = block(ids, hidden[position])
        if index >= middle[0]:
            pooled.append(torch.cat([F.normalize(states[:, 1:], dim=-1).mean(1) for states in hidden]))
    return pooled
