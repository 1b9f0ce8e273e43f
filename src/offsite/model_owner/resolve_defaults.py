"""Fills in the defaults of `offsite pack` that depend on the base and on what is installed. Torch-free."""

from offsite.config import PackSpec
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.calibration_pictures import has_photos


def resolve_defaults(model: BaseModel, spec: PackSpec) -> PackSpec:
    """Set defaults that work for this base, for settings that were left out.

    For an image encoder without calibration pictures, and for a family whose blocks cannot be run one by one,
    `prune_by` becomes magnitude and `heal` none.

    Args:
        model: the opened base.
        spec: the settings.
    """
    if not lacks_pictures(model, spec) and model.family.runs_by_block:
        return spec
    instead = {"heal": "none", "prune_by": "magnitude"}
    return spec.changed({key: value for key, value in instead.items() if key not in spec.explicit_keys})


def lacks_pictures(model: BaseModel, spec: PackSpec) -> bool:
    """Whether the base is an image encoder, and there are no calibration pictures to run it on."""
    return model.family.vision is not None and spec.calibration.source is None and not has_photos()
