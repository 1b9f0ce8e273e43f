"""Rules on what the features of trained blocks do for tokens: silent features, and rows that answer to one token."""

from collections.abc import Collection, Iterator, Mapping, Sequence

from offsite.data_owner.audit_traps.activity import Activity, FeatureActivity, Selectivity
from offsite.data_owner.audit_traps.findings import Finding, finding

SILENT = 1e-3  # usual activity below which a feature is silent, in units of the median feature's RMS
RARE = 2e-3  # share of tokens for which a silent feature of a sparse layer is active
SELECTIVE = 3.0  # largest answer to a token, in units of the second largest
DEVIATION = 12.0  # and at least this many robust standard deviations
_SHARE = 0.002  # share of features that may be silent; honest models have single ones, mostly in their last blocks
_SPARSE_SHARE = 0.02  # the same for a sparse layer
_SPARSE = 0.2  # a layer with more silent features is sparse: with ReLU, most features are zero for most tokens


def silent_findings(place: str, found: FeatureActivity, others: Sequence[FeatureActivity]) -> Iterator[Finding]:
    """Yield a finding if features of a layer are silent for almost all tokens.

    Args:
        place: the name of the layer that reads the features.
        found: their activity.
        others: the activity of the same layer's features in other blocks.
    """
    silent = found.usual < SILENT
    count = found.usual.numel()
    if silent.float().mean() > _SPARSE:
        silent = found.active < RARE
        usual = sorted(float((one.active < RARE).float().mean()) for one in others)
        middle = usual[len(usual) // 2] if usual else 0.0
        if float(silent.float().mean()) > max(_SPARSE_SHARE, 2 * middle):
            rows = silent.nonzero().flatten().tolist()
            yield finding("silent features", place, rows, float(found.active.min()), RARE)
        return
    rows = silent.nonzero().flatten().tolist()
    if len(rows) > max(1, _SHARE * count):
        yield finding("silent features", place, rows, float(found.usual.min()), SILENT)


def selective_findings(place: str, rows: Selectivity) -> Iterator[Finding]:
    """Yield a finding if rows of a layer answer to one token far more than to all others."""
    ratio = rows.first / rows.second.clamp_min(1e-12)
    far = ((ratio > SELECTIVE) & (rows.first > DEVIATION)).nonzero().flatten()
    if len(far):
        tokens = rows.token[far].tolist()
        yield finding("selective rows", place, far.tolist(), float(ratio[far].max()), SELECTIVE, tokens)


def activity_findings(
    place: int, found: Activity, others: Collection[Activity], outputs: Collection[str]
) -> Iterator[Finding]:
    """Yield the findings about the features that enter the last layers of attention and MLP of one block.

    Args:
        place: the block's index.
        found: its measurements.
        others: those of other blocks.
        outputs: the paths of the layers whose inputs are judged; experts are judged too.
    """
    judged: Mapping[str, FeatureActivity] = {
        path: one for path, one in found.features.items() if path in outputs or path.rpartition(".")[2].isdigit()
    }
    for path, one in judged.items():
        elsewhere = [other.features[path] for other in others if path in other.features]
        yield from silent_findings(f"block {place}, {path}", one, elsewhere)
