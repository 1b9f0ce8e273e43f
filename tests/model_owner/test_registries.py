"""Every method is one file and one row: each row's file has its kind's functions, and each file a row."""

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from offsite.config.emulator_methods import (
    HEALING_STEPS,
    PRUNERS,
    SELECTION_RULES,
    STORED_FORMS,
    UNIT_RULES,
    HealingStep,
    Pruner,
)
from offsite.model_owner import compress, heal, narrow, select
from offsite.model_owner.compress.pruner_protocol import CalibratedPruner, StoredPruner
from offsite.model_owner.compress.stored_form_protocol import BlockReshaping, MatrixEncoding
from offsite.model_owner.heal.block_step_protocol import BlockStep
from offsite.model_owner.heal.healing_protocol import EmulatorStep, PlacesStep
from offsite.model_owner.narrow.unit_rule_protocol import UnitOrdering
from offsite.model_owner.select.selection_protocol import Selector

# What the methods of a folder share.
SHARED = {
    select: {"selection_protocol", "select_blocks"},
    heal: {
        "healing_protocol",
        "heal_steps",
        "block_step_protocol",
        "block_by_block",
        "hidden_states",
        "middle_states",
        "output_projection",
        "output_layers",
        "expert_outputs",
        "gradient_refit",
        "held_norm",
        "held_solution",
        "block_error",
        "measured_response",
        "ridge",
        "unsolvable",
    },
    compress: {
        "pruner_protocol",
        "calibrated_pruning",
        "stored_form_protocol",
        "declare_emulator",
        "smallest_weights",
    },
    narrow: {
        "unit_rule_protocol",
        "even_widths",
        "budget_widths",
        "choose_widths",
        "removal_errors",
        "expert_problem",
        "kept_layers",
        "loss_statistics",
        "projection_inputs",
        "remove_units",
    },
}


def protocol_of(row: Any) -> Any:
    """What the file of a row must have."""
    if isinstance(row, HealingStep):
        return {"places": PlacesStep, "block": BlockStep, "after": EmulatorStep}[row.runs]
    if isinstance(row, Pruner):
        return CalibratedPruner if row.calibrated else StoredPruner
    if row in SELECTION_RULES.values():
        return Selector
    if row in UNIT_RULES.values():
        return UnitOrdering
    return MatrixEncoding if row.encodes_matrices else BlockReshaping


ROWS = [
    *SELECTION_RULES.values(),
    *HEALING_STEPS.values(),
    *PRUNERS.values(),
    *UNIT_RULES.values(),
    *STORED_FORMS.values(),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.module)
def test_the_file_of_a_row_has_the_functions_of_its_kind(row: Any) -> None:
    module, protocol = import_module(row.module), protocol_of(row)
    assert isinstance(module, protocol)
    functions = {name for name in dir(protocol) if inspect.isfunction(getattr(protocol, name)) and name[0] != "_"}
    assert functions
    for name in functions:
        expected = list(inspect.signature(getattr(protocol, name)).parameters)[1:]  # all but self
        assert list(inspect.signature(getattr(module, name)).parameters) == expected, name


@pytest.mark.parametrize("room", SHARED, ids=lambda room: room.__name__)
def test_every_file_with_a_method_has_a_row(room: Any) -> None:
    files = {f"{room.__name__}.{file.stem}" for file in Path(room.__file__).parent.glob("[!_]*.py")}
    shared = {f"{room.__name__}.{name}" for name in SHARED[room]}
    assert shared < files
    assert files - shared == {row.module for row in ROWS if row.module.startswith(f"{room.__name__}.")}


def test_every_row_says_what_its_method_does() -> None:
    assert all(row.summary for row in ROWS)
    assert len({row.summary for row in ROWS}) == len(ROWS)
