"""Checks whether the model owner permits the settings that a data owner chose for a tuning run."""

from dataclasses import dataclass

from offsite.config.pack_groups import PermitSettings
from offsite.config.tune_spec import TuneSpec


@dataclass(frozen=True)
class Unpermitted:
    """A setting of a tuning run that the model owner does not permit."""

    key: str  # the setting of `tune`
    requested: str
    permitted: str
    setting: str  # the setting of `pack` that would permit it


def unpermitted(spec: TuneSpec, permits: PermitSettings) -> list[Unpermitted]:
    """List every setting of a tuning run that the model owner does not permit.

    Args:
        spec: the settings of the tuning run.
        permits: the methods and the largest sizes that the owner permits.
    """
    adapter, found = spec.adapter, []
    if adapter.method not in permits.methods:
        found.append(Unpermitted("method", f"method {adapter.method}", ", ".join(permits.methods), "methods"))
    if adapter.method == "lora" and adapter.rank > permits.max_rank:
        found.append(Unpermitted("rank", f"rank {adapter.rank}", f"up to {permits.max_rank}", "max_rank"))
    if adapter.method == "bottleneck" and adapter.width > permits.max_width:
        found.append(Unpermitted("width", f"width {adapter.width}", f"up to {permits.max_width}", "max_width"))
    if adapter.tune_head and not permits.permit_head:
        found.append(Unpermitted("tune_head", "tune_head", "no head", "permit_head"))
    return found
