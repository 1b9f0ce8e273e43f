"""Checks whether the model's owner would accept the return of a tuning with these settings. Torch-free."""

from offsite.config import PermitSettings, TuneSpec, unpermitted
from offsite.errors import IncompatibleError, PolicyError, UsageError
from offsite.protocol.manifest import BundleManifest

_NO_HEAD = (
    "--tune-head, the bundle does not permit the head: its owner did not say `pack --permit-head`, which works where "
    "the head is not the input embedding"
)


def require_permitted(manifest: BundleManifest, spec: TuneSpec) -> None:
    """Refuse settings of a tuning that cannot work, or whose return the model's owner would refuse.

    Args:
        manifest: the bundle's manifest, with the permissions.
        spec: the settings of the tuning.

    Raises:
        UsageError: several checkpoints or reported losses were requested for pictures.
        IncompatibleError: BitFit was requested, but the trained blocks have no biases.
        PolicyError: the bundle does not permit the method, LoRA's rank, the bottlenecks' width or training of the head.
    """
    if manifest.family.vision is not None and spec.not_for_images():
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
    permits = PermitSettings(
        methods=manifest.methods,
        max_rank=manifest.max_rank,
        max_width=manifest.max_width,
        permit_head=bool(manifest.head),
    )
    reasons = [
        _NO_HEAD if one.key == "tune_head" else f"{one.requested}, the bundle permits {one.permitted}"
        for one in unpermitted(spec, permits)
    ]
    if reasons:
        raise PolicyError(
            "the model's owner would refuse this tuning",
            reasons=reasons,
            next_step="choose what the bundle permits (`offsite inspect BUNDLE`), or ask the owner for another bundle",
        )


def resolve_defaults(spec: TuneSpec, tokens_at_once: int) -> TuneSpec:
    """Fill in the default that depends on the device, the bundle and the compute dtype: the number of tokens at once.

    Args:
        spec: the settings.
        tokens_at_once: the default, from `offsite.kernels.runtime.usual_tokens_at_once`.
    """
    return spec.changed({"micro_batch_tokens": spec.memory.micro_batch_tokens or tokens_at_once})


def require_something_to_report(spec: TuneSpec, eval_data: object) -> None:
    """Refuse settings that report held-out losses if there are no held-out rows.

    Args:
        spec: the settings of the tuning.
        eval_data: the held-out rows; None if there are none.

    Raises:
        UsageError: scores are to be reported, and there are no held-out rows.
    """
    if spec.points.report_scores and eval_data is None:
        raise UsageError(
            "--report-scores has no rows to measure a loss on",
            next_step="name held-out rows with --eval-data, or leave --report-scores out",
        )
