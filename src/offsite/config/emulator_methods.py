"""The registries of the methods that make an emulator. Torch-free.

An entry names the Python module of its method and the rules for its use. A new method is one file in the folder of its
kind, with the functions that the kind's protocol names, and one entry here. Choices of settings, rules on combinations
and help texts follow from the entries. The registries are here and not in those folders for the reasons in
docs/decisions/0022-registries.md.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

_OWNER = "offsite.model_owner"


@dataclass(frozen=True)
class SelectionRule:
    """Registry entry of a rule that chooses which of the base's middle blocks the emulator keeps.

    Its Python module implements the protocol `select.selection_protocol.Selector`.
    """

    name: str  # the value of `select`
    summary: str
    module: str
    runs_blocks: bool = False  # it runs the base's blocks on calibration data
    resumable: bool = False  # it takes long, and saves resume points
    for_images: bool = True  # it works for image encoders
    for_spread: bool = True  # it works with trained blocks between frozen ones
    instead: str = "uniform"  # the rule that an error recommends if this one does not work


@dataclass(frozen=True)
class HealingStep:
    """Registry entry of a step that compensates for dropped blocks or pruned weights.

    The value of `runs` says which protocol in the folder `heal` its Python module implements.
    """

    name: str  # one of the names in `heal`
    summary: str
    module: str
    # places: it puts a kept block in the place of each dropped block; block: it changes one kept block after the other,
    # in one pass over the base; after: it changes the complete emulator after that pass
    runs: Literal["places", "block", "after"]
    fills_gap: bool = True  # it compensates for dropped blocks, which only one step may do
    heals_pruning: bool = False  # it is useful after a calibrated pruner too, even if no block is dropped
    solves_outputs: bool = False  # it needs blocks whose output is linear in the outputs of the solved layers
    resumable: bool = False  # it takes long, and saves resume points
    declared: bool = False  # its blocks differ from the family's, and the bundle's config declares how
    alone: str = ""  # why it cannot be combined with another step
    not_with_calibrated: str = ""  # why no calibrated pruner may run with it
    for_images: bool = True
    for_spread: bool = True


@dataclass(frozen=True)
class Pruner:
    """Registry entry of a pruner: a method that chooses which weights of a matrix become zero.

    Its Python module implements `StoredPruner` or, if `calibrated`, `CalibratedPruner` of `compress.pruner_protocol`.
    """

    name: str  # the value of `prune_by`
    summary: str
    module: str
    calibrated: bool = False  # it runs in the pass over the base's blocks, on the inputs of each linear layer
    by_output: bool = False  # it compares the weights of one output (matrix row), so each output loses the same share
    mlp_output_last: bool = False  # the MLP's output projection is pruned after the others, on their pruned outputs


@dataclass(frozen=True)
class UnitRule:
    """Registry entry of a rule that chooses the heads, MLP neurons and experts that remain in a narrowed block.

    Its Python module implements the protocol `narrow.unit_rule_protocol.UnitOrdering`.
    """

    name: str  # the value of `narrow_by`
    summary: str
    module: str
    for_experts: bool = True  # it also chooses experts
    by_loss: bool = False  # it needs to know how the base's loss depends on each block, which takes a backward pass


@dataclass(frozen=True)
class StoredForm:
    """Registry entry of a form in which a bundle stores blocks, other than the family's: quantised, low-rank and so on.

    Its Python module implements `DeclaringForm` of `compress.stored_form_protocol`.
    """

    name: str  # the setting that turns it on
    summary: str
    module: str
    encodes_matrices: bool  # each matrix is stored as other tensors; a matrix can have only one such form
    lossy: bool = True  # it makes the emulator smaller, so pruning is off by default


_SELECTION_RULES = (
    SelectionRule("uniform", "evenly spread blocks, the first and the last among them", f"{_OWNER}.select.uniform"),
    SelectionRule(
        "influence",
        "the blocks that change the hidden state's direction most (ShortGPT)",
        f"{_OWNER}.select.influence",
        runs_blocks=True,
    ),
    SelectionRule(
        "cluster",
        "one block of each cluster of neighbours with similar outputs (CRaSh)",
        f"{_OWNER}.select.cluster",
        runs_blocks=True,
        for_images=False,
        for_spread=False,
        instead="influence",
    ),
    SelectionRule(
        "contiguous", "all but one run of consecutive blocks", f"{_OWNER}.select.contiguous", for_spread=False
    ),
    SelectionRule(
        "search",
        "the blocks with the lowest loss found within search_minutes",
        f"{_OWNER}.select.search",
        runs_blocks=True,
        resumable=True,
        for_images=False,
        for_spread=False,
        instead="influence",
    ),
    SelectionRule("random", "blocks drawn by the seed, as a control", f"{_OWNER}.select.random_choice"),
)

_HEALING_STEPS = (
    HealingStep(
        "share",
        "each dropped block is replaced by the nearest kept one (CRaSh)",
        f"{_OWNER}.heal.share",
        runs="places",
        declared=True,
        not_with_calibrated="which would make the shared copies of a block differ",
        for_images=False,
        for_spread=False,
    ),
    HealingStep(
        "refit",
        "output projections of kept blocks are solved again by ridge regression",
        f"{_OWNER}.heal.refit",
        runs="block",
        heals_pruning=True,
        solves_outputs=True,
    ),
    HealingStep(
        "affine",
        "an affine layer h + h W + b after each kept block is solved by ridge regression",
        f"{_OWNER}.heal.affine",
        runs="block",
        declared=True,
        alone="refit and share fill the same gap, and distill would train the blocks without the affine layers; "
        "choose heal = affine, or heal = refit,distill",
        not_with_calibrated="which needs its own pass over the blocks",
        for_images=False,
        for_spread=False,
    ),
    HealingStep(
        "distill",
        "kept blocks are trained to give the output of all middle blocks; always the last step",
        f"{_OWNER}.heal.distill",
        runs="after",
        fills_gap=False,
        heals_pruning=True,
        resumable=True,
        for_spread=False,
    ),
)

_PRUNERS = (
    Pruner("magnitude", "the smallest weights of each matrix become zero", f"{_OWNER}.compress.magnitude"),
    Pruner(
        "sparsegpt",
        "the weights that matter least become zero, and the others are adjusted",
        f"{_OWNER}.compress.sparsegpt",
        calibrated=True,
        mlp_output_last=True,
    ),
    Pruner(
        "wanda",
        "in each output, the weights with the smallest |weight| x input norm become zero",
        f"{_OWNER}.compress.wanda",
        calibrated=True,
        by_output=True,
    ),
)

_UNIT_RULES = (
    UnitRule("obs", "those whose loss the others can make up for least (ZipLM, SlimGPT)", f"{_OWNER}.narrow.obs"),
    UnitRule(
        "fisher",
        "as obs, and what changes the base's loss counts, not what changes the hidden state (Fisher information)",
        f"{_OWNER}.narrow.obs",
        by_loss=True,
    ),
    UnitRule(
        "gradot",
        "those without which gradients would change most (GradOT's score of channels)",
        f"{_OWNER}.narrow.gradot",
        for_experts=False,
        by_loss=True,
    ),
    UnitRule("energy", "those that add most to the hidden state", f"{_OWNER}.narrow.energy"),
)

_STORED_FORMS = (
    StoredForm("bits", "weights in 8 or 4 bits", f"{_OWNER}.compress.quantise", encodes_matrices=True),
    StoredForm("svd_rank", "matrices as products of two factors", f"{_OWNER}.compress.low_rank", encodes_matrices=True),
    StoredForm(
        "mlp_width", "fewer neurons in the feed-forward part", f"{_OWNER}.compress.mlp_width", encodes_matrices=False
    ),
    StoredForm(
        "zeros",
        "pruned matrices as a mask and the nonzero weights",
        f"{_OWNER}.compress.sparse_matrices",
        encodes_matrices=True,
        lossy=False,
    ),
)

SELECTION_RULES = {entry.name: entry for entry in _SELECTION_RULES}
HEALING_STEPS = {entry.name: entry for entry in _HEALING_STEPS}
PRUNERS = {entry.name: entry for entry in _PRUNERS}
UNIT_RULES = {entry.name: entry for entry in _UNIT_RULES}
STORED_FORMS = {entry.name: entry for entry in _STORED_FORMS}

# Types of settings that hold a name.
if TYPE_CHECKING:
    SelectionName: TypeAlias = str
    HealingName: TypeAlias = str
    PrunerName: TypeAlias = str
    UnitRuleName: TypeAlias = str
else:
    SelectionName = Literal[tuple(SELECTION_RULES)]
    HealingName = Literal[tuple(HEALING_STEPS)]
    PrunerName = Literal[tuple(PRUNERS)]
    UnitRuleName = Literal[tuple(UNIT_RULES)]
