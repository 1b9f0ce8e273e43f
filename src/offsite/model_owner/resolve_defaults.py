"""Sets the defaults of `offsite pack` that depend on the base and on installed packages. Torch-free."""

from offsite.config import PackSpec
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.calibration.calibration_pictures import has_photos


def resolve_defaults(model: BaseModel, spec: PackSpec) -> PackSpec:
    """The settings with other defaults where the general ones do not work for this base, or are worse.

    For an image encoder without calibration pictures, and for a family whose blocks cannot be run one by one,
    `prune_by` becomes magnitude and `heal` none. If a norm follows the MLP, and weights are pruned but no block is
    dropped, `heal` becomes none (docs/decisions/0004-refit.md). With `heal_minutes`, `heal` becomes refit,distill, and
    distill in place of none. Settings that the user gave do not change.
    """
    instead: dict[str, str] = {}
    if lacks_pictures(model, spec) or not model.family.runs_by_block:
        instead = {"heal": "none", "prune_by": "magnitude"}
    elif only_pruned(spec) and model.family.refit_way("mlp", model.config) == "in front of the norm":
        instead = {"heal": "none"}
    if spec.distill.minutes is not None:
        instead |= {"heal": "distill" if instead.get("heal") == "none" else "refit,distill"}
    given = spec.explicit_keys | ({"heal"} if "refit_maps" in spec.explicit_keys else set())
    unset = {key: value for key, value in instead.items() if key not in given}
    return spec.changed(unset) if unset else spec


def only_pruned(spec: PackSpec) -> bool:
    """Whether the settings prune weights, but neither drop nor narrow blocks, nor store them with loss."""
    lossy = spec.drops or spec.narrows or any(form.lossy for form in spec.stored_forms)
    return spec.pruned > 0 and not lossy


def lacks_pictures(model: BaseModel, spec: PackSpec) -> bool:
    """Whether the base is an image encoder, and there are no calibration pictures, neither named nor installed."""
    return model.family.vision is not None and spec.calibration.source is None and not has_photos()
