"""Fills in the defaults of `offsite pack` that depend on the base and on what is installed. Torch-free."""

from offsite.config import PackSpec
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.calibration_pictures import has_photos


def resolve_defaults(model: BaseModel, spec: PackSpec) -> PackSpec:
    """Replace settings that were left out and that cannot work here.

    Without pictures to run an image encoder on, and for a family whose blocks cannot be run one by one, weights are
    pruned by magnitude and nothing is healed, where `prune_by` and `heal` were left out.

    Args:
        model: the opened base.
        spec: the settings.
    """
    if not lacks_pictures(model, spec) and model.family.runs_by_block:
        return spec
    instead = {"heal": "none", "prune_by": "magnitude"}
    return spec.changed({key: value for key, value in instead.items() if key not in spec.explicit_keys})


def lacks_pictures(model: BaseModel, spec: PackSpec) -> bool:
    """Whether the base is an image encoder, and there are no pictures to run it on."""
    return model.family.vision is not None and spec.calibration.source is None and not has_photos()
