"""The settings of every verb (a command such as `tune`), as frozen classes. Torch-free.

Command-line flags, TOML files and Python all set the same settings. Defaults were chosen by measurement on
SmolLM2-135M-Instruct; docs/decisions/ says how.
"""

from offsite.config.emulator_methods import HealingStep, Pruner, SelectionRule, StoredForm, UnitRule
from offsite.config.eval_spec import EvalSpec
from offsite.config.import_spec import ImportSpec
from offsite.config.pack_groups import PermitSettings, RefitMap
from offsite.config.pack_spec import USUAL_PRUNE, PackSpec
from offsite.config.permission_rules import Unpermitted, unpermitted
from offsite.config.plug_in_spec import STRENGTHS, PlugInSpec
from offsite.config.runtime_settings import RuntimeSettings
from offsite.config.setting_types import Dtype, Method
from offsite.config.settings_file import TABLES, load_spec
from offsite.config.spec import Setting, Settings, Spec, rule
from offsite.config.tune_spec import TuneSpec
from offsite.config.validation_messages import Problem, describe_validation, problems_of

__all__ = [
    "STRENGTHS",
    "TABLES",
    "USUAL_PRUNE",
    "Dtype",
    "EvalSpec",
    "HealingStep",
    "ImportSpec",
    "Method",
    "PackSpec",
    "PermitSettings",
    "PlugInSpec",
    "Problem",
    "Pruner",
    "RefitMap",
    "RuntimeSettings",
    "SelectionRule",
    "Setting",
    "Settings",
    "Spec",
    "StoredForm",
    "TuneSpec",
    "UnitRule",
    "Unpermitted",
    "describe_validation",
    "load_spec",
    "problems_of",
    "rule",
    "unpermitted",
]
