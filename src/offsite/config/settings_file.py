"""Build the spec of a verb from its table in a TOML file and from flags.

A flag overrides the value in the file, and the file overrides the default.
"""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from offsite.config.eval_spec import EvalSpec
from offsite.config.import_spec import ImportSpec
from offsite.config.pack_spec import PackSpec
from offsite.config.plug_in_spec import PlugInSpec
from offsite.config.spec import S, Spec
from offsite.config.tune_spec import TuneSpec
from offsite.config.validation_messages import describe_validation
from offsite.encodings import decode_text
from offsite.errors import UsageError
from offsite.spelling import nearest

# The tables that a TOML file may hold, one for each verb with settings.
TABLES: dict[str, type[Spec]] = {
    "import": ImportSpec,
    "pack": PackSpec,
    "tune": TuneSpec,
    "plug-in": PlugInSpec,
    "eval": EvalSpec,
}


def load_spec(kind: type[S], settings: Mapping[str, Any], config: Path | None = None) -> S:
    """Build the spec of one verb. `settings` override the TOML file, which overrides the defaults.

    Args:
        kind: the class of the spec.
        settings: values by key; a value of None is ignored, so that the file or the default decides.
        config: a TOML file with one table per verb ([pack], [tune], ...); None: no file is read.

    Raises:
        UsageError: the file cannot be read, or a table, key or value is wrong; every problem is listed.
    """
    table = next(name for name, spec in TABLES.items() if spec is kind)
    in_file = _read_toml(config).get(table, {}) if config is not None else {}
    explicit = {key: value for key, value in settings.items() if value is not None}
    _require_one_way(kind, explicit)
    try:
        return kind.model_validate(kind.overlaid(in_file, explicit))
    except ValidationError as error:
        where = f"the settings of '{table}'" + (f" in {config}" if config else "")
        raise UsageError(
            f"{where} are wrong",
            reasons=describe_validation(error, kind),
            next_step=f"see `offsite {table} --help` for the settings and their ranges",
        ) from None


def _require_one_way(kind: type[Spec], settings: Mapping[str, Any]) -> None:
    """Raise UsageError if `settings` has two keys that exclude each other in this class of spec, such as `epochs` and
    `max_steps`.
    """
    for sides in kind.alternatives:
        both = [key for side in sides for key in side if key in settings]
        if sum(any(key in settings for key in side) for side in sides) > 1:
            raise UsageError(f"{' and '.join(both)} were both given", next_step="give one of them")


def _read_toml(config: Path) -> dict[str, dict[str, Any]]:
    """The tables of a TOML file, by the name of the verb.

    Raises:
        UsageError: the file cannot be read, or has an unknown table or key.
    """
    try:
        tables: dict[str, Any] = tomllib.loads(decode_text(config.read_bytes()))
    except OSError as error:
        raise UsageError(
            f"cannot read the settings file {config}: {error.strerror or error}",
            next_step="name a TOML file with --config, or leave --config out",
        ) from None
    except UnicodeError as error:
        raise UsageError(
            f"the settings file {config} is no text", reasons=[str(error)[:200]], next_step="save it as UTF-8"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(
            f"the settings file {config} is not TOML",
            reasons=[str(error)],
            next_step="correct it there; docs/reference.md has an example of every table",
        ) from None
    unknown = sorted(name for name in tables if name not in TABLES or not isinstance(tables[name], dict))
    if unknown:
        raise UsageError(
            f"{config} has entries that are not tables of settings: {', '.join(unknown)}",
            reasons=_meant(unknown, TABLES),
            next_step=f"the tables are {', '.join(f'[{name}]' for name in TABLES)}",
        )
    for name, table in tables.items():  # a typing error in another stage's table must not go unnoticed
        stray = sorted(set(table) - TABLES[name].settings().keys())
        if stray:
            raise UsageError(
                f"{config} has unknown settings in [{name}]: {', '.join(stray)}",
                reasons=_meant(stray, TABLES[name].settings()),
                next_step=f"the settings of [{name}] are {', '.join(sorted(TABLES[name].settings().keys()))}",
            )
    return tables


def _meant(unknown: Sequence[str], known: Iterable[str]) -> list[str]:
    """A line for each unknown name that resembles a known one."""
    names = list(known)
    return [f"{name}: did you mean {close!r}?" for name in unknown if (close := nearest(name, names))]
