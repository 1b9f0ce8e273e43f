"""The table of the model families that this package describes, by the `model_type` of their configs. Torch-free."""

from collections.abc import Mapping
from typing import Any

from offsite.errors import IncompatibleError
from offsite.models.families.family import Architecture, Vision, config_problems
from offsite.models.families.language_families import FAMILIES
from offsite.models.families.timm_family import TIMM
from offsite.models.families.vision_families import VISION_FAMILIES

__all__ = ["ARCHITECTURES", "Architecture", "Vision", "architecture_of", "config_problems"]

ARCHITECTURES: Mapping[str, Architecture] = {
    family.model_type: family for family in (*FAMILIES, *VISION_FAMILIES, TIMM)
}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The family in the table for a config, found by the config's `model_type`.

    Raises:
        IncompatibleError: no family has that type, or a setting of the config changes the blocks so that they are not
            as the family's description says.
    """
    family = ARCHITECTURES.get(str(config.get("model_type")))
    if family is None:
        raise IncompatibleError(
            f"models of type {str(config.get('model_type'))[:64]!r} are not supported",
            reasons=[f"supported: {', '.join(sorted(ARCHITECTURES))}"],
            next_step="use a model of another type; docs/models.md lists those that work",
        )
    bad = family.set_switches(config)
    if bad:
        raise IncompatibleError(
            f"this {family.model_type} model has blocks that cannot be cut",
            reasons=[f"config has {key} = {value!r}: {family.refused[key]}" for key, value in bad.items()],
            next_step="use a checkpoint without that setting",
        )
    strays = family.strays(config)
    if strays:
        raise IncompatibleError(
            f"this {family.model_type} model is not supported",
            reasons=strays,
            next_step="import the model again with `offsite import MODEL --out base/`",
        )
    return family
