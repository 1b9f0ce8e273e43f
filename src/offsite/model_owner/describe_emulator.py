"""Describes in one line how an emulator is made, from the settings and the model's family. Torch-free."""

from offsite.config import HealingStep, PackSpec
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.emulator_work import work_of
from offsite.model_owner.resolve_defaults import lacks_pictures
from offsite.model_owner.sandwich import Sandwich


def describe_emulator(model: BaseModel, sandwich: Sandwich, spec: PackSpec) -> str:
    """One line of text that says how many blocks the emulator keeps, and how they are pruned, stored and healed."""
    work, middle = work_of(sandwich.middle, spec), len(sandwich.middle)
    kept = spec.kept(sandwich.middle)
    blocks = f"{kept} of {middle} blocks by {spec.select.by}" if kept < middle else f"all {middle} blocks"
    parts = [blocks]
    if spec.narrows:
        parts.append(f"{_narrowing(spec)} by {spec.narrow.by}")
    if spec.pruned:
        parts.append(f"{spec.pruned:.0%} of each matrix zero by {spec.pruner.name}")
    parts += [form.name.replace("_", " ") + f" {getattr(spec.compress, form.name)}" for form in spec.stored_forms]
    places = [step.name for step in spec.healing_steps if step.runs == "places" and kept < middle]
    parts += places + [healing_name(step, model, spec) for step in work.steps if step.runs != "places"]
    if not places and not work.steps:
        want = " for want of pictures (--calibration FOLDER)" if lacks_pictures(model, spec) else ""
        parts.append(f"not healed{want}")
    return f"{model.family.model_type}: {', '.join(parts)}"


def _narrowing(spec: PackSpec) -> str:
    if spec.narrow.share is not None:
        return f"narrowed to {spec.narrow.share:.0%} of the arithmetic"
    shares = {"heads": spec.narrow.heads, "neurons": spec.narrow.neurons, "experts": spec.narrow.experts}
    return f"narrowed to {' and '.join(f'{share:.0%} of the {part}' for part, share in shares.items() if share)}"


def healing_name(step: HealingStep, model: BaseModel, spec: PackSpec) -> str:
    """The name of a healing step; for refit also its method in this family, such as "refit of mlp in closed form"."""
    if not step.solves_outputs:
        return step.name
    ways = [f"{part} {model.family.refit_way(part, model.config)}" for part in dict.fromkeys(spec.heal.refit_maps)]
    return f"{step.name} of {' and '.join(ways)}"
