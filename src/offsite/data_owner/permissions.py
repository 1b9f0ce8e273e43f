"""Whether the model's owner would take back what a tuning with these settings returns. Torch-free."""

from pathlib import Path

from offsite.config import TuneSpec
from offsite.errors import IncompatibleError, PolicyError, UsageError
from offsite.models.architectures import ARCHITECTURES
from offsite.protocol.manifest import BundleManifest


def require_permitted(manifest: BundleManifest, spec: TuneSpec) -> None:
    """Refuse settings that cannot work, or whose return the owner would refuse.

    Raises:
        UsageError: the head was asked for with bottlenecks, or checkpoints or scores of pictures.
        IncompatibleError: BitFit was asked for, and the trained blocks have no biases.
        PolicyError: the method, the rank, the width or the head is not permitted.
    """
    if spec.adapter.tune_head and spec.adapter.method == "bottleneck":
        raise UsageError(
            "--tune-head does not go with bottlenecks",
            reasons=["what they are plugged in as stands beside the base, and holds none of the base's own tensors"],
            next_step="tune by lora, full or bitfit, or leave --tune-head out",
        )
    if ARCHITECTURES[manifest.architecture].vision is not None and (
        spec.points.checkpoints > 1 or spec.points.report_scores
    ):
        raise UsageError(
            "a return of pictures holds one checkpoint and no scores",
            reasons=["its classifier would have to be in every checkpoint"],
            next_step="leave out --checkpoints and --report-scores",
        )
    if spec.adapter.method == "bitfit" and not manifest.own_tensors("bitfit"):
        raise IncompatibleError(
            f"BitFit trains biases, and the trained blocks of this {manifest.architecture} model have none",
            next_step=f"tune by another method: the bundle permits {', '.join(manifest.methods)}",
        )
    reasons = []
    if spec.adapter.method not in manifest.methods:
        reasons.append(f"method {spec.adapter.method}, the bundle permits {', '.join(manifest.methods)}")
    if spec.adapter.method == "lora" and spec.adapter.rank > manifest.max_rank:
        reasons.append(f"rank {spec.adapter.rank}, the bundle permits up to {manifest.max_rank}")
    if spec.adapter.method == "bottleneck" and spec.adapter.width > manifest.max_width:
        reasons.append(f"width {spec.adapter.width}, the bundle permits up to {manifest.max_width}")
    if spec.adapter.tune_head and not manifest.head:
        reasons.append(
            "--tune-head, the bundle does not permit the head: its owner did not say `pack --permit-head`, which works "
            "where the head is not the input embedding"
        )
    if reasons:
        raise PolicyError(
            "the model's owner would refuse this tuning",
            reasons=reasons,
            next_step="choose what the bundle permits (`offsite inspect BUNDLE`), or ask the owner for another bundle",
        )


def resolve_defaults(spec: TuneSpec, architecture: str, item: int) -> TuneSpec:
    """Fill in the default that depends on the bundle and the compute dtype: how many tokens run at once.

    Args:
        spec: the settings.
        architecture: of the bundle's model.
        item: bytes of a number in the compute dtype.
    """
    wide_text = item == 4 and ARCHITECTURES[architecture].vision is None
    at_once = spec.memory.micro_batch_tokens or (spec.tokens_at_once // 2 if wide_text else spec.tokens_at_once)
    return spec.changed({"micro_batch_tokens": at_once})


def require_something_to_report(spec: TuneSpec, eval_data: Path | None) -> None:
    """Refuse to report the losses of rows that are not there.

    Raises:
        UsageError: scores are to be reported, and there are no held-out rows.
    """
    if spec.points.report_scores and eval_data is None:
        raise UsageError(
            "--report-scores has no rows to measure a loss on",
            next_step="name held-out rows with --eval-data, or leave --report-scores out",
        )
