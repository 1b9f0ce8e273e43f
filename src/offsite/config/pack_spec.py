"""The settings of `offsite pack`, and the rules about combinations of these settings."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from offsite.config.emulator_methods import (
    HEALING_STEPS,
    PRUNERS,
    SELECTION_RULES,
    STORED_FORMS,
    UNIT_RULES,
    HealingName,
    HealingStep,
    Pruner,
    SelectionRule,
    StoredForm,
    UnitRule,
)
from offsite.config.pack_groups import (
    CalibrationSettings,
    CompressSettings,
    DistillSettings,
    HealSettings,
    NarrowSettings,
    PermitSettings,
    Placement,
    SelectSettings,
    SplitSettings,
)
from offsite.config.runtime_settings import RuntimeSettings
from offsite.config.setting_types import Dtype
from offsite.config.spec import Spec, rule

USUAL_PRUNE = 0.5  # share of zeros in an emulator that drops no block


class PackSpec(Spec):
    """The settings of `offsite pack`."""

    if TYPE_CHECKING:  # every setting is a keyword argument, by its key

        def __init__(self, **settings: Any) -> None: ...

    alternatives = (
        (("train",), ("bottom", "top")),
        (("distill_epochs",), ("distill_steps",), ("heal_minutes",)),
        (("narrow",), ("narrow_heads", "narrow_neurons", "narrow_experts")),
    )

    split: SplitSettings = SplitSettings()
    select: SelectSettings = SelectSettings()
    heal: HealSettings = HealSettings()
    distill: DistillSettings = DistillSettings()
    compress: CompressSettings = CompressSettings()
    narrow: NarrowSettings = NarrowSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    permits: PermitSettings = PermitSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    dtype: Annotated[Dtype, Field(description="dtype of the bundle's weights")] = "bf16"
    seed: Annotated[int, Field(ge=0, lt=2**63, description="seed of random selection, search and distillation")] = 0

    @rule
    def _something_trains(self) -> None:
        """`bottom` and `top` are not both 0, unless `placement` = every; otherwise nothing would train."""
        bottom = 0 if self.placement == "top" else self.split.bottom
        if bottom == self.split.top == 0 and not self.adapts_emulator:
            raise ValueError("bottom and top are both 0: nothing would train")

    @rule
    def _blocks_are_listed_or_counted(self) -> None:
        """`train` lists the blocks that train, each once; `bottom` and `top` count them: give one or the other."""
        train = self.split.train
        if train is not None and (self.split.bottom is not None or self.split.top is not None):
            raise ValueError("train lists the blocks that train, bottom and top count them: give one or the other")
        if train is not None and len(set(train)) < len(train):
            raise ValueError("train names a block twice")

    @rule
    def _placement_fits(self) -> None:
        """`placement` = list needs `train`; sandwich and top exclude `train`; top excludes `bottom` above 0."""
        if self.placement == "list" and self.split.train is None:
            raise ValueError("placement = list needs train: the blocks that are sent uncompressed and train")
        if self.placement in ("sandwich", "top") and self.split.train is not None:
            raise ValueError(f"placement = {self.placement} cannot be used with train: choose list, or every")
        if self.placement == "list" and (self.split.bottom is not None or self.split.top is not None):
            raise ValueError("placement = list cannot be used with bottom and top: train lists the blocks")
        if self.placement == "top" and self.split.bottom:
            raise ValueError("placement = top trains no first blocks: leave bottom out, or choose sandwich")

    @rule
    def _no_whole_block_comes_back(self) -> None:
        """`placement` = every excludes full from `methods`: a tuned compressed block cannot be put into the base."""
        if self.adapts_emulator and "full" in self.permits.methods and "methods" in self.explicit_keys:
            raise ValueError(
                "methods = full cannot be used with placement = every: whole blocks that were tuned compressed cannot "
                "be carried to the base; permit lora, bottleneck or bitfit"
            )

    @rule
    def _healing_fits(self) -> None:
        """`heal` lists no step twice and at most one of refit, share and affine; distill is last; affine is alone."""
        steps = self.healing_steps
        if len(set(self.heal.steps)) != len(self.heal.steps):
            raise ValueError(f"heal names a step twice: {','.join(self.heal.steps)}")
        for step in steps:
            if step.alone and len(steps) > 1:
                raise ValueError(f"{step.name} is heal's only step: {step.alone}")
        for step in steps[:-1]:
            if step.runs == "after":
                raise ValueError(
                    f"{step.name} must be heal's last step: a closed form after it would undo what it learnt"
                )
        filling = [step.name for step in steps if step.fills_gap]
        if len(filling) > 1:
            raise ValueError(f"{' and '.join(filling)} are two ways to fill the same gap: choose one")

    @rule
    def _pruner_fits_healing(self) -> None:
        """A `prune_by` that reads calibration data cannot be combined with `heal` = share or affine."""
        for step in self.healing_steps:
            if self.pruned and self.pruner.calibrated and step.not_with_calibrated:
                others = " or ".join(row.name for row in PRUNERS.values() if not row.calibrated)
                raise ValueError(
                    f"heal = {step.name} cannot run with prune_by = {self.pruner.name}, {step.not_with_calibrated}: "
                    f"choose prune_by = {others}"
                )

    @rule
    def _forms_fit(self) -> None:
        """At most one of `bits`, `svd_rank` and `zeros` = left-out; `zeros` = left-out needs `prune` above 0."""
        encodings = [form.name for form in self.stored_forms if form.encodes_matrices]
        if len(encodings) > 1:
            raise ValueError(f"{' and '.join(encodings)} are different ways to store a matrix: choose one")
        if self.compress.zeros == "left-out" and self.pruned == 0:
            raise ValueError("zeros = left-out needs prune above 0")

    @rule
    def _narrowing_fits(self) -> None:
        """`narrow` excludes `narrow_heads`, `_neurons`, `_experts`; all four exclude `mlp_width` and `heal` = share."""
        given = [name for name, share in self._narrowing.items() if share is not None]
        if "narrow" in given and len(given) > 1:
            raise ValueError(f"narrow sets by itself what stays: give it or {' and '.join(given[1:])}")
        if given and self.compress.mlp_width is not None:
            raise ValueError(f"{given[0]} and mlp_width are two ways to remove neurons: choose one")
        if given and any(step.runs == "places" for step in self.healing_steps):
            raise ValueError(f"{given[0]} does not go with heal = share: copies of a block would differ")

    @rule
    def _rule_chooses_what_is_narrowed(self) -> None:
        """`narrow_experts` excludes a `narrow_by` that does not choose experts: gradot."""
        if self.narrow.experts is not None and not self.unit_rule.for_experts:
            others = " or ".join(row.name for row in UNIT_RULES.values() if row.for_experts)
            raise ValueError(
                f"narrow_by = {self.unit_rule.name} does not choose experts: choose narrow_by = {others}, or leave "
                "narrow_experts out"
            )

    @rule
    def _budget_has_a_total(self) -> None:
        """`narrow_widths` = budget divides the total of `narrow`; shares of heads, neurons or experts are no total."""
        shares = [name for name, share in self._narrowing.items() if share is not None and name != "narrow"]
        if self.narrow.widths == "budget" and shares:
            raise ValueError(
                f"narrow_widths = budget divides the total of narrow, and {' and '.join(shares)} set each block's own "
                "share: give narrow instead, or choose narrow_widths = even"
            )

    @rule
    def _distillation_has_one_length(self) -> None:
        """`heal_minutes` needs distill in `heal`, and excludes `distill_steps`; without `heal`, it is refit,distill."""
        if self.distill.minutes is not None and not any(step.resumable for step in self.healing_steps):
            raise ValueError(
                "heal_minutes is the length of a distillation: leave heal out, or choose distill or refit,distill"
            )
        if self.distill.minutes is not None and self.distill.steps is not None:
            raise ValueError("heal_minutes and distill_steps both set the length of the distillation: give one")

    @rule
    def _settings_of_one_method(self) -> None:
        """`refit_maps` has an effect only with `heal` = refit, `drop_from` only with `select` = contiguous."""
        if self.heal.refit_maps != ("mlp",) and not any(step.solves_outputs for step in self.healing_steps):
            raise ValueError("refit_maps has an effect only with heal = refit")
        if self.select.drop_from is not None and self.select.by != "contiguous":
            raise ValueError("drop_from has an effect only with select = contiguous")

    def not_for_spread(self) -> list[str]:
        """Settings in use that exclude trained blocks between frozen ones: stored forms, narrowing, some methods."""
        rule = self.selection_rule
        return [
            *([] if rule.for_spread else [f"select = {rule.name}"]),
            *(f"heal = {step.name}" for step in self.healing_steps if not step.for_spread),
            *(f"{form.name}: a declared module kind" for form in self.stored_forms),
            *(["narrow: a declared module kind"] if self.narrows else []),
        ]

    def not_for_images(self) -> list[str]:
        """Settings in use that exclude image encoders: stored forms, narrowing, `distill_ce`, some `select`/`heal`."""
        rule = self.selection_rule
        return [
            *([] if rule.for_images else [f"select = {rule.name}"]),
            *(f"heal = {step.name}" for step in self.healing_steps if not step.for_images),
            *(["distill_ce: the next token's cross-entropy"] if self.distill.ce else []),
            *(f"{form.name}: a declared module kind" for form in self.stored_forms),
            *(["narrow: a declared module kind"] if self.narrows else []),
            *(["methods = bottleneck"] if set(self.permits.methods) == {"bottleneck"} else []),
        ]

    def nearest(self, fits: Callable[[SelectionRule | HealingStep], bool], *, left_out: Sequence[str] = ()) -> str:
        """Advice for an error message: which options to change, such as "pack with --heal refit and without --bits".

        Only options that do not work for the base change. A selection rule is replaced by the one that its registry
        entry recommends; healing steps and other settings are left out.

        Args:
            fits: whether a selection rule or a healing step works for the base.
            left_out: keys of other settings that do not work.
        """
        rule, steps = self.selection_rule, [step.name for step in self.healing_steps if fits(step)]
        flags = [] if fits(rule) else [f"--select {rule.instead}"]
        if len(steps) < len(self.healing_steps):
            flags.append(f"--heal {','.join(steps) or 'refit'}")
        if self.distill.minutes is not None and not any(HEALING_STEPS[name].resumable for name in steps):
            left_out = [*left_out, "heal_minutes"]
        keys = type(self).settings()
        without = " and ".join(f"--{key.replace('_', '-')}" if keys[key].has_flag else key for key in left_out)
        parts = [f"with {' '.join(flags)}"] if flags else []
        return f"pack {' and '.join([*parts, *([f'without {without}'] if without else [])])}"

    @property
    def placement(self) -> Placement:
        """Which blocks get trained weights: the value of `placement`, or its default."""
        return self.split.placement or ("sandwich" if self.split.train is None else "list")

    @property
    def adapts_emulator(self) -> bool:
        """Whether the data owner may also train adapters on the emulator's compressed blocks."""
        return self.placement == "every"

    def verbatim(self, blocks: int) -> frozenset[int]:
        """The indices of the blocks that are sent uncompressed and train, for a base with `blocks` blocks.

        By default these are the first 4 and the last 6 of 30 blocks (docs/decisions/0009). In a small base they are
        fewer, so that the emulator has as many blocks as `keep` says, or at least one. With `placement` = every there
        are none, unless `train`, `bottom` or `top` is set.
        """
        if self.split.train is not None:
            return frozenset(self.split.train)
        usual_bottom = max(2, round(2 * blocks / 15)) if self.placement == "sandwich" else 0
        usual_top = 0 if self.adapts_emulator else max(2, round(blocks / 5))
        bottom, top = self.split.bottom, self.split.top
        room = max(0, blocks - (self.select.keep or 1) - (bottom or 0) - (top or 0))  # blocks left for the defaults
        if bottom is None:
            bottom = min(usual_bottom, room if top is not None else room // 2)
            room -= bottom
        if top is None:
            top = min(usual_top, room)
        return frozenset((*range(min(bottom, blocks)), *range(max(blocks - top, 0), blocks)))

    @property
    def declares(self) -> tuple[str, ...]:
        """Names of healing steps and settings in use that make the emulator's modules differ from the family's."""
        steps = [step.name for step in HEALING_STEPS.values() if step.declared and step in self.healing_steps]
        return (*steps, *self.declaring_settings)

    @property
    def declaring_settings(self) -> tuple[str, ...]:
        """Names of settings in use, other than `heal`, that make the emulator's modules differ from the family's."""
        return (*(form.name for form in self.stored_forms), *self.narrowing_settings)

    @property
    def narrowing_settings(self) -> tuple[str, ...]:
        """Names of the settings in use that remove heads, neurons or experts from the emulator's blocks."""
        return tuple(name for name, share in self._narrowing.items() if share is not None and share < 1)

    @property
    def _narrowing(self) -> dict[str, float | None]:
        """The values of `narrow`, `narrow_heads`, `narrow_neurons` and `narrow_experts`, by key; None if not set.

        Each is the share that remains: of the multiply-adds, the heads, the MLP neurons, the experts.
        """
        settings = self.narrow
        return {
            "narrow": settings.share,
            "narrow_heads": settings.heads,
            "narrow_neurons": settings.neurons,
            "narrow_experts": settings.experts,
        }

    @property
    def narrows(self) -> bool:
        """Whether heads, neurons or experts are removed from the emulator's blocks."""
        return bool(self.narrowing_settings)

    @property
    def shares_budget(self) -> bool:
        """Whether blocks lose more or fewer heads and neurons by sensitivity, within one total."""
        return self.narrows and self.narrow.widths == "budget"

    @property
    def unit_rule(self) -> UnitRule:
        """The registry entry of the rule that chooses which heads, MLP neurons and experts remain."""
        return UNIT_RULES[self.narrow.by]

    @property
    def selection_rule(self) -> SelectionRule:
        """The registry entry of the rule that chooses which middle blocks the emulator keeps."""
        return SELECTION_RULES[self.select.by]

    @property
    def healing_steps(self) -> tuple[HealingStep, ...]:
        """The registry entries of the healing steps, in the order in which `heal` lists them.

        Where `heal_minutes` is set and `heal` is not, they are refit and distill.
        """
        timed = self.distill.minutes is not None and "heal" not in self.explicit_keys
        names: Sequence[HealingName] = ("refit", "distill") if timed else self.heal.steps
        return tuple(HEALING_STEPS[name] for name in names)

    @property
    def pruner(self) -> Pruner:
        """The registry entry of the pruner, which chooses the weights that become zero (none if `pruned` is 0).

        If `prune_by` is not set, it is a pruner that can be combined with the healing steps.
        """
        usual = PRUNERS[self.compress.prune_by]
        if "prune_by" in self.explicit_keys or not any(step.not_with_calibrated for step in self.healing_steps):
            return usual
        return next(row for row in PRUNERS.values() if not row.calibrated)

    @property
    def stored_forms(self) -> tuple[StoredForm, ...]:
        """Registry entries of the stored forms in use; empty if blocks are stored as in the family's checkpoints."""
        usual = CompressSettings()
        return tuple(
            form for form in STORED_FORMS.values() if getattr(self.compress, form.name) != getattr(usual, form.name)
        )

    @property
    def pruned(self) -> float:
        """The share of the weights of each emulator matrix that is set to zero: `prune`, or its default."""
        if self.compress.prune is not None:
            return self.compress.prune
        compressed = self.drops or self.narrows or any(form.lossy for form in self.stored_forms)
        return USUAL_PRUNE if not compressed or self.compress.zeros == "left-out" else 0.0

    @property
    def drops(self) -> bool:
        """Whether blocks of the middle are dropped: `keep` is set, or another setting needs dropped blocks."""
        needs = self.select.by != "uniform" or any(
            step.fills_gap and not step.heals_pruning for step in self.healing_steps
        )
        return self.select.keep is not None or needs

    def kept(self, middle: Sequence[int]) -> int:
        """How many of the middle blocks the emulator keeps.

        If `keep` is not set and another setting needs dropped blocks, it is 4 of 13 (rounded, at least 1), or the
        number of middle blocks before `drop_from` if that is more.

        Args:
            middle: indices of the base's blocks that the emulator replaces.
        """
        if self.select.keep is not None or not self.drops:
            return len(middle) if self.select.keep is None else self.select.keep
        before = 0 if self.select.drop_from is None or not middle else self.select.drop_from - middle[0]
        return min(max(1, round(4 * len(middle) / 13), before), len(middle))

    @property
    def resumable(self) -> bool:
        """Whether packing saves resume points, which it does for long steps: distillation and search."""
        return self.selection_rule.resumable or any(step.resumable for step in self.healing_steps)
