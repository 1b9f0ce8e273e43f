"""Writes docs/reference.md from the specs in offsite.config, so that it cannot drift: `make docs`."""

import types
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic.fields import FieldInfo

from offsite.cli.setting_flags import flag_of, shown
from offsite.config import TABLES, Setting, Spec
from offsite.config.emulator_methods import HEALING_STEPS, PRUNERS, SELECTION_RULES, UNIT_RULES

HERE = Path(__file__).parent

INTRODUCTION = """# Settings

<!-- Made by docs/render_reference.py from src/offsite/config/; run `make docs` after a change there. -->

Every setting of every verb. A setting can be given in three ways, under the same name each time:

- as a flag, where it has one: `offsite tune ... --rank 8`;
- in a TOML file, in the verb's table: `[tune]`, then `rank = 8`; the file goes to the verb with `--config FILE`;
- from Python, as a keyword argument: `TuneSpec(rank=8)`. It is read from its group: `spec.adapter.rank`.

Flags win over the file, the file wins over the defaults. An unknown name is an error. On the command line the parts of
a list stand with commas between them: `--heal refit,distill`. A switch has a second form that turns it off:
`--no-permit-head`. Which flags are no settings (`--out`, `--data`, ...) `offsite VERB --help` says.
"""

METHODS = {"select": SELECTION_RULES, "heal": HEALING_STEPS, "prune_by": PRUNERS, "narrow_by": UNIT_RULES}


def render() -> str:
    """The document."""
    return "\n".join([INTRODUCTION, *(line for verb, kind in TABLES.items() for line in _verb(verb, kind))])


def _verb(verb: str, kind: type[Spec]) -> Iterator[str]:
    yield f"## offsite {verb}\n"
    yield f"Table `[{verb}]`, in Python `{kind.__name__}`.\n"
    settings = list(kind.settings().values())
    for group in sorted(dict.fromkeys(setting.group for setting in settings), key=lambda group: group is None):
        if group is not None:
            holder = kind.model_fields[group].annotation
            yield f"### {verb}: {group}\n\n{holder.__doc__}\n"
        elif any(setting.group for setting in settings):
            yield f"### {verb}: in no group\n"
        yield "| name | flag | in Python | values | default | what it does |\n|---|---|---|---|---|---|"
        yield from (_row(setting) for setting in settings if setting.group == group)
        yield ""
    for key, methods in METHODS.items():
        if key in kind.settings():
            yield f"Choices of `{key}`:\n"
            yield from (f"- `{name}`: {method.summary}{_limits(method)}" for name, method in methods.items())
            yield ""
    of_models = [getattr(kind, name).__doc__ for name in ("not_for_spread", "not_for_images") if hasattr(kind, name)]
    rules = [*(check.__doc__ for check in kind.rules()), *_alternatives(kind), *of_models]
    if rules:
        yield f"### {verb}: what goes together\n"
        yield from (f"- {rule}" for rule in rules)
        yield ""


def _limits(method: Any) -> str:
    """Which models and placements a method is not for."""
    limits = {"for_images": "not for image encoders", "for_spread": "not with trained blocks between frozen ones"}
    told = [words for name, words in limits.items() if not getattr(method, name, True)]
    return f" ({'; '.join(told)})" if told else ""


def _row(setting: Setting) -> str:
    field = setting.field
    flag = f"`{flag_of(setting)}`" if setting.has_flag else ""
    place = setting.name if setting.group is None else f"{setting.group}.{setting.name}"
    default = f"`{str(field.default).lower() if isinstance(field.default, bool) else shown(field.default)}`"
    default = "left out" if field.default is None else default
    examples = ", ".join(f"`{example}`" for example in field.examples or ())
    values = f"such as {examples}" if examples else _values(field.annotation, field.metadata)
    cells = (f"`{setting.key}`", flag, f"`{place}`", values, default)
    return f"| {' | '.join(cells)} | {field.description} |"


def _alternatives(kind: type[Spec]) -> Iterator[str]:
    for sides in kind.alternatives:
        named = [" and ".join(f"`{key}`" for key in side) for side in sides]
        yield f"{' or '.join(named)}: a flag of one takes the place of what the file says by the other."


def _values(annotation: Any, constraints: Sequence[Any]) -> str:
    """What a setting may be, in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [one for mark in parts[1:] for one in (mark.metadata if isinstance(mark, FieldInfo) else [mark])]
        return _values(parts[0], [*inner, *constraints])
    if origin in (Union, types.UnionType):
        return _values(next(part for part in parts if part is not types.NoneType), constraints)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in parts)
    if origin is tuple:
        return f"list of: {_values(parts[0], [])}"
    if annotation is str:
        return "text"
    names = {bool: "`true`, `false`", int: "whole number", float: "number", Path: "file or folder"}
    bounds = _bounds(constraints)
    return f"{names[annotation]}{', ' if bounds else ''}{bounds}"


def _bounds(constraints: Iterable[Any]) -> str:
    words = {Ge: "at least {ge}", Gt: "above {gt}", Le: "at most {le}", Lt: "below {lt}"}
    told = [words[type(one)].format(**_bound(one)) for one in constraints if type(one) in words]
    assert all(type(one) not in (MinLen, MaxLen) for one in constraints)
    return ", ".join(told)


def _bound(constraint: Any) -> dict[str, str]:
    (name,) = (name for name in ("ge", "gt", "le", "lt") if hasattr(constraint, name))
    value = getattr(constraint, name)
    return {name: "2^63" if value == 2**63 else f"{value:g}" if isinstance(value, float) else str(value)}


if __name__ == "__main__":
    (HERE / "reference.md").write_text(render(), encoding="utf-8")
