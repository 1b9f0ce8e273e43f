"""The methods that make an emulator: one row each, with its file and what settings it goes with. Torch-free.

A new method is one file beside those of its kind, with the functions that the kind's protocol names, and one row here.
Choices of settings, rules on combinations and help follow from the rows. docs/decisions/0022-registries.md says why the
table stands here and not beside the files.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

_OWNER = "offsite.model_owner"


@dataclass(frozen=True)
class SelectionRule:
    """A rule for the blocks of the middle that stay; its file is a `select.selection.Selector`."""

    name: str  # the value of `select`
    summary: str
    module: str
    runs_blocks: bool = False  # it looks at what calibration data give in the base's blocks
    resumable: bool = False  # it takes long, and remembers what it did
    for_images: bool = True  # whether image encoders can have it
    for_spread: bool = True  # whether it goes with trained blocks between frozen ones


@dataclass(frozen=True)
class HealingStep:
    """A way to make up for what is lost; its file is what `heal.healing` names for `runs`."""

    name: str  # a word of `heal`
    summary: str
    module: str
    # places: it says which blocks stand in the dropped ones' places; block: it changes each kept block in its turn, in
    # one pass over the base; after: it changes the whole emulator behind that pass
    runs: Literal["places", "block", "after"]
    fills_gap: bool = True  # a dropped block is to be made up for once
    heals_pruning: bool = False  # it also has something to do where no block is dropped and a calibrated pruner ran
    solves_outputs: bool = False  # it needs a residual that is linear in what the solved layers give
    resumable: bool = False  # it takes long, and keeps resume points
    declared: bool = False  # the emulator's blocks are no longer the family's
    alone: str = ""  # why no other step may stand beside it
    not_with_calibrated: str = ""  # why no calibrated pruner may run with it
    for_images: bool = True
    for_spread: bool = True


@dataclass(frozen=True)
class Pruner:
    """A choice of the weights that become zero; its file is a `compress.pruner.StoredPruner` or `CalibratedPruner`."""

    name: str  # the value of `prune_by`
    summary: str
    module: str
    calibrated: bool = False  # it runs in the pass over the base's blocks, on the inputs of each linear layer
    by_output: bool = False  # it compares the weights of one output, so each output loses the same share
    mlp_output_last: bool = False  # the MLP's output projection has a turn of its own, on what the pruned layers give


@dataclass(frozen=True)
class StoredForm:
    """A way to store blocks that is not the family's; its file is a `DeclaringForm` of `compress.stored_form`."""

    name: str  # the setting that asks for it
    summary: str
    module: str
    encodes_matrices: bool  # each matrix is stored as other tensors; a matrix has one such form
    lossy: bool = True  # an emulator with it is compressed, so nothing is pruned unless that is asked for


_SELECTION_RULES = (
    SelectionRule("uniform", "evenly spread blocks, the first and the last among them", f"{_OWNER}.select.uniform"),
    SelectionRule(
        "influence",
        "the blocks that turn the hidden state most (ShortGPT)",
        f"{_OWNER}.select.influence",
        runs_blocks=True,
    ),
    SelectionRule(
        "cluster",
        "one block of each cluster of neighbours with like outputs (CRaSh)",
        f"{_OWNER}.select.cluster",
        runs_blocks=True,
        for_images=False,
        for_spread=False,
    ),
    SelectionRule("contiguous", "all but one piece of neighbours", f"{_OWNER}.select.contiguous", for_spread=False),
    SelectionRule(
        "search",
        "the blocks with the lowest loss that are found in the time given",
        f"{_OWNER}.select.search",
        runs_blocks=True,
        resumable=True,
        for_images=False,
        for_spread=False,
    ),
    SelectionRule("random", "blocks drawn by the seed, as a control", f"{_OWNER}.select.random_choice"),
)

_HEALING_STEPS = (
    HealingStep(
        "share",
        "every dropped block's place is taken by the nearest kept one (CRaSh)",
        f"{_OWNER}.heal.share",
        runs="places",
        declared=True,
        not_with_calibrated="under which what is shared would come to differ",
        for_images=False,
        for_spread=False,
    ),
    HealingStep(
        "refit",
        "output projections of kept blocks are solved anew by ridge regression",
        f"{_OWNER}.heal.refit",
        runs="block",
        heals_pruning=True,
        solves_outputs=True,
    ),
    HealingStep(
        "affine",
        "a map h + h W + b behind each kept block is solved by ridge regression",
        f"{_OWNER}.heal.affine",
        runs="block",
        declared=True,
        alone="refit and share fill the same gap, distill trains the blocks as if there were no maps behind them; "
        "choose heal = affine, or heal = refit,distill",
        not_with_calibrated="which has a pass of its own",
        for_images=False,
        for_spread=False,
    ),
    HealingStep(
        "distill",
        "kept blocks train to give what the whole middle gave; the last step",
        f"{_OWNER}.heal.distill",
        runs="after",
        fills_gap=False,
        heals_pruning=True,
        resumable=True,
        for_spread=False,
    ),
)

_PRUNERS = (
    Pruner("magnitude", "the smallest weights of each matrix go", f"{_OWNER}.compress.magnitude"),
    Pruner(
        "sparsegpt",
        "the weights whose loss costs least go, and the others make up for them",
        f"{_OWNER}.compress.sparsegpt",
        calibrated=True,
        mlp_output_last=True,
    ),
    Pruner(
        "wanda",
        "the weights of each output go that are smallest times the norm of their input",
        f"{_OWNER}.compress.wanda",
        calibrated=True,
        by_output=True,
    ),
)

_STORED_FORMS = (
    StoredForm("bits", "weights in 8 or 4 bits", f"{_OWNER}.compress.quantise", encodes_matrices=True),
    StoredForm("svd_rank", "matrices as two factors", f"{_OWNER}.compress.low_rank", encodes_matrices=True),
    StoredForm(
        "mlp_width", "fewer neurons in the feed-forward part", f"{_OWNER}.compress.mlp_width", encodes_matrices=False
    ),
    StoredForm(
        "zeros",
        "pruned matrices as a mask and the weights that stay",
        f"{_OWNER}.compress.sparse",
        encodes_matrices=True,
        lossy=False,
    ),
)

SELECTION_RULES = {row.name: row for row in _SELECTION_RULES}
HEALING_STEPS = {row.name: row for row in _HEALING_STEPS}
PRUNERS = {row.name: row for row in _PRUNERS}
STORED_FORMS = {row.name: row for row in _STORED_FORMS}

# Types of settings that hold a name.
if TYPE_CHECKING:
    SelectionName: TypeAlias = str
    HealingName: TypeAlias = str
    PrunerName: TypeAlias = str
else:
    SelectionName = Literal[tuple(SELECTION_RULES)]
    HealingName = Literal[tuple(HEALING_STEPS)]
    PrunerName = Literal[tuple(PRUNERS)]
