"""Fills in the defaults of `offsite pack` that depend on the base and on what is installed. Torch-free."""

from offsite.config import PackSpec
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.calibration_pictures import has_photos


def resolve_defaults(model: BaseModel, spec: PackSpec) -> PackSpec:
    """Set defaults that work for this base and are the best for it, for settings that were left out.

    For an image encoder without calibration pictures, and for a family whose blocks cannot be run one by one,
    `prune_by` becomes magnitude and `heal` none. Where a norm follows the MLP, and weights are pruned but no block is
    dropped, `heal` becomes none (docs/decisions/0004-refit.md).

    Args:
        model: the opened base.
        spec: the settings.
    """
    instead: dict[str, str] = {}
    if lacks_pictures(model, spec) or not model.family.runs_by_block:
        instead = {"heal": "none", "prune_by": "magnitude"}
    elif only_pruned(spec) and model.family.refit_way("mlp", model.config) == "in front of the norm":
        instead = {"heal": "none"}
    given = spec.explicit_keys | ({"heal"} if "refit_maps" in spec.explicit_keys else set())
    unset = {key: value for key, value in instead.items() if key not in given}
    return spec.changed(unset) if unset else spec


def only_pruned(spec: PackSpec) -> bool:
    """Whether the emulator keeps every block, in its family's own form, and weights of it become zero."""
    lossy = spec.drops or spec.narrows or any(form.lossy for form in spec.stored_forms)
    return spec.pruned > 0 and not lossy


def lacks_pictures(model: BaseModel, spec: PackSpec) -> bool:
    """Whether the base is an image encoder, and there are no calibration pictures to run it on."""
    return model.family.vision is not None and spec.calibration.source is None and not has_photos()
