"""What is checked before a packing begins, and by `--plan` too: what the run refuses is known without running it.

Only config, headers and settings are read, and the calibration text; nothing is written. Torch-free.
"""

from dataclasses import dataclass
from pathlib import Path

from offsite.config import PackSpec
from offsite.model_owner.base_model import BaseModel, open_base
from offsite.model_owner.bundle_settings import settings_files
from offsite.model_owner.calibration_text import require_calibration
from offsite.model_owner.partition import DTYPES, permitted_methods
from offsite.model_owner.sandwich import Sandwich
from offsite.model_owner.split import split
from offsite.model_owner.work import work_of
from offsite.protocol.artifacts import Base
from offsite.protocol.home import Home
from offsite.protocol.signing import Identity, PublicKey
from offsite.storage.files import require_free
from offsite.training.run_log import require_resume_asked, run_folder


@dataclass(frozen=True)
class Packing:
    """A packing that nothing is known to stand against."""

    model: BaseModel
    sandwich: Sandwich  # how it is cut
    identity: Identity  # who signs
    recipient: PublicKey  # who may tune it


def check_packing(
    base: Base, out: Path, recipient: str, spec: PackSpec, home: Home, *, resume: bool = False
) -> Packing:
    """Refuse a packing that could not end in a bundle.

    Args:
        base: the owner's full model.
        out: the bundle's folder.
        recipient: the name under which the owner trusts the data owner's key.
        spec: how to split, compress and heal.
        home: the owner's.
        resume: whether an interrupted distillation or search is to be continued.

    Raises:
        UsageError: `out` holds something, this home has no key, the recipient is unknown, a setting does not fit the
            model, there is an interrupted run that was not to be resumed, or a package that is needed is not installed.
        IncompatibleError: the model cannot be cut or healed in this way, or a file of it holds what may not travel.
        DataError: the calibration text or pictures cannot be read.
        StorageError: a file of the base is missing or broken.
    """
    require_free(out)
    identity, key = home.identity(), home.trusted_key(recipient)
    model = open_base(base)
    sandwich = require_packable(model, spec)
    if spec.resumable:
        require_resume_asked(run_folder(out), resume=resume)
    if runs_network(sandwich, spec):
        require_calibration(model, spec, distills=bool(work_of(sandwich.middle, spec).later_steps))
        if model.family.vision is not None and model.family.vision.extra:
            from offsite.models.library_calls import require_library

            require_library(model.family, model.folder)
    return Packing(model, sandwich, identity, key)


def require_packable(model: BaseModel, spec: PackSpec) -> Sandwich:
    """Refuse settings that do not fit a model, whoever packs it for whom, and before there are calibration data.

    Returns:
        How the base is cut.

    Raises:
        UsageError: a setting does not fit the model.
        IncompatibleError: the model cannot be cut or healed in this way, or a file of it holds what may not travel.
        StorageError: a file of the base is missing or broken.
    """
    sandwich = split(model, spec)
    permitted_methods(model, spec)
    settings_files(model, range(model.blocks), DTYPES[spec.dtype])  # what may not travel must show before the long work
    return sandwich


def runs_network(sandwich: Sandwich, spec: PackSpec) -> bool:
    """Whether the base's network runs, to select blocks or to heal them."""
    chooses = spec.selection_rule.runs_blocks and spec.kept(sandwich.middle) < len(sandwich.middle)
    return chooses or work_of(sandwich.middle, spec).runs_network
