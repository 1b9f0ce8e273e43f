"""Renders a settings file for a party to start from: the settings that matter, commented out, with their defaults.

Names, defaults, choices and explanations come from the specs, so that the file cannot differ from them.
"""

import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Literal

from offsite.cli.setting_flags import choices_of
from offsite.config import TABLES, Setting

Party = Literal["owner", "data"]
STARTER_FILE = "offsite.toml"
_WIDTH = 110  # characters of a comment line

# The tables and settings of each party's file; the value is shown if the setting has no default of its own.
_SHOWN: Mapping[Party, Mapping[str, Mapping[str, object]]] = {
    "owner": {
        "pack": {
            "bottom": 4,
            "top": 6,
            "placement": "top",
            "prune": 0.5,
            "keep": 8,
            "heal": None,
            "calibration": "own-text.txt",
            "methods": None,
            "max_rank": None,
            "permit_head": None,
            "dtype": None,
            "compute": None,
            "device": None,
        },
        "plug-in": {"as": "merged", "strength": 1.0, "checkpoint": 1},
        "eval": {"max_length": None, "long_rows": None, "max_rows": 1000, "device": None},
    },
    "data": {
        "tune": {
            "method": None,
            "rank": None,
            "lr": 1e-3,
            "epochs": None,
            "batch_size": None,
            "max_length": None,
            "long_rows": None,
            "columns": "prompt=question,completion=answer",
            "memory": None,
            "eval_every": 50,
            "checkpoints": None,
            "report_scores": None,
            "seed": None,
            "compute": None,
            "device": None,
        },
        "eval": {"max_length": None, "long_rows": None, "max_rows": 1000, "device": None},
    },
}


def render_starter_file(party: Party) -> str:
    """Render the TOML file of one party; as long as every setting is commented out, it changes nothing.

    Args:
        party: the model's owner or the data's.
    """
    owned = "a model" if party == "owner" else "data"
    lines = [
        f"# Settings of offsite for the owner of {owned}. A command reads them with --config {STARTER_FILE}; flags win",
        "# over them. Take the # off in front of what you want to change: the value is the default, or where a setting",
        "# is left out by default, an example. All settings: docs/reference.md, or `offsite VERB --help`.",
    ]
    for table, shown in _SHOWN[party].items():
        lines += ["", f"[{table}]"]
        for key, example in shown.items():
            lines += ["", *_lines(TABLES[table].settings()[key], example)]
    return "\n".join(lines) + "\n"


def _lines(setting: Setting, example: object) -> Iterator[str]:
    """Yield the lines of one setting: what it does, its choices, and the setting itself, all commented out."""
    default = setting.field.default
    examples = (default, example, *(setting.field.examples or ()))
    value = next(one for one in examples if one is not None)
    choices = choices_of(setting.field.annotation)
    words = f"{setting.field.description}{'; choices: ' + ', '.join(choices) if choices else ''}"
    yield from (f"# {line}" for line in _wrapped(words))
    yield f"#{setting.key} = {_toml(list(value) if isinstance(value, tuple) else value)}"


def _toml(value: object) -> str:
    """A value as TOML; texts, numbers, switches and lists are written as in JSON."""
    return json.dumps(value)


def _wrapped(text: str) -> list[str]:
    """A text in lines of at most `_WIDTH` characters."""
    return textwrap.wrap(text, _WIDTH)
