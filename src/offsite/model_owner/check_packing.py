"""The checks before packing, which `--plan` runs too, so that a plan reports the errors that packing would raise.

They read config, headers, settings and calibration data, and write nothing. Torch-free.
"""

from dataclasses import dataclass
from pathlib import Path

from offsite.config import PackSpec
from offsite.data.data_files import data_digest
from offsite.model_owner.base_model import BaseModel, open_base
from offsite.model_owner.bundle_settings import settings_files
from offsite.model_owner.bundle_tensors import DTYPES, permitted_methods
from offsite.model_owner.calibration.calibration_text import require_calibration
from offsite.model_owner.check_bundle import check_settings_of
from offsite.model_owner.emulator_work import work_of
from offsite.model_owner.partition import partition
from offsite.model_owner.resolve_defaults import resolve_defaults
from offsite.model_owner.sandwich import Sandwich
from offsite.protocol.artifacts import Base
from offsite.protocol.home import Home
from offsite.protocol.output_place import require_place
from offsite.protocol.signing import Identity, PublicKey
from offsite.training.run_identity import require_same_run
from offsite.training.run_log import require_resume_asked, run_folder

# Settings that do not change the result, so a resumed run may change them.
_FREE_SETTINGS = frozenset({"threads", "search_minutes"})


@dataclass(frozen=True)
class Packing:
    """A packing that passed all checks: the opened base, the final settings, the split, and both parties' keys."""

    model: BaseModel
    spec: PackSpec  # the settings, with the defaults that depend on the base
    sandwich: Sandwich  # the split into bottom, middle and top
    identity: Identity  # the signing key
    recipient: PublicKey  # key of the party that may tune the bundle


def check_packing(
    base: Base, out: Path, recipient: str, spec: PackSpec, home: Home, *, resume: bool = False
) -> Packing:
    """Run all checks on a packing, and return what was opened for them.

    Args:
        base: the owner's full model.
        out: the bundle's folder.
        recipient: the name under which the owner's home stores the data owner's public key.
        spec: the settings of splitting, compression and healing.
        home: the model owner's home folder, with its keys and its ledger.
        resume: whether to continue an interrupted distillation or search.

    Raises:
        UsageError: `out` is not free, or inside a model or an artifact; the home has no key, the recipient is unknown,
            a setting does not fit the model, an interrupted run exists and `resume` is false, or a required package is
            not installed.
        IncompatibleError: the model cannot be split or healed with these settings, or one of its files holds settings
            that a bundle may not contain.
        DataError: the calibration text or pictures cannot be read.
        StorageError: a file of the base is missing or broken.
    """
    require_place(out, base.folder, spec.calibration.source)
    identity, key = home.identity(), home.trusted_key(recipient)
    model = open_base(base)
    if model.family.layouts:
        from offsite.model_owner.prove_family import prove_family

        model = prove_family(model)
    spec = resolve_defaults(model, spec)
    sandwich = require_packable(model, spec)
    if spec.resumable and require_resume_asked(run_folder(out), resume=resume):
        require_same_run(run_folder(out), identity_of_packing(spec), without=("base",))  # the run compares that too
    if model.family.vision is not None and model.family.vision.extra:
        from offsite.models.hugging_face_calls import require_library

        require_library(model.family, model.folder)
    if runs_network(sandwich, spec):
        require_calibration(model, spec, distills=bool(work_of(sandwich.middle, spec).later_steps))
    return Packing(model, spec, sandwich, identity, key)


def identity_of_packing(spec: PackSpec) -> dict[str, object]:
    """The settings and the calibration data of a packing, by name; an interrupted one is only resumed with the same."""
    text = data_digest(spec.calibration.source) if spec.calibration.source else None
    return {**spec.flat(without=_FREE_SETTINGS), "text": text}


def require_packable(model: BaseModel, spec: PackSpec) -> Sandwich:
    """Raise an error if the settings do not fit the model.

    These checks need neither the recipient nor the calibration data.

    Returns:
        The split of the base into bottom, middle and top.

    Raises:
        UsageError: a setting does not fit the model.
        IncompatibleError: the model cannot be split or healed with these settings, or one of its files holds settings
            that a bundle may not contain.
        StorageError: a file of the base is missing or broken.
    """
    sandwich = partition(model, spec)
    permitted_methods(model, spec)
    # forbidden settings, and a tokenizer that does not fit, are reported before the long work
    check_settings_of(model, settings_files(model, range(model.blocks), DTYPES[spec.dtype]))
    return sandwich


def runs_network(sandwich: Sandwich, spec: PackSpec) -> bool:
    """Whether packing runs the base's network, to select blocks, prune or heal."""
    chooses = spec.selection_rule.runs_blocks and spec.kept(sandwich.middle) < len(sandwich.middle)
    return chooses or work_of(sandwich.middle, spec).runs_network
