"""Makes a command-line flag from each setting of a spec: its help, type, choices and default."""

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from keyword import iskeyword
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer

if TYPE_CHECKING:
    from offsite.config import Setting, Spec

PANEL = "Settings"
FlagValues = Mapping[str, object]  # the values of the flags for settings, by key; None: the flag was left out

_WIDEST_CHOICES = 32  # characters of choices that fit next to the flag; longer lists are in the help text


def with_flags(verb: Callable[..., None], kind: "type[Spec] | None") -> Callable[..., None]:
    """Replace the parameter `flag_values` of a command's function by a parameter (flag) for each setting of its spec.

    Args:
        verb: the function of the command; its parameter `flag_values` gets the values of the flags by key.
        kind: the spec class of its settings; None: no flags, for a command of which only name and help are needed.

    Returns:
        The function for typer, which calls `verb`.
    """
    settings = kind.settings() if kind else {}
    keys = {_parameter(key): key for key, setting in settings.items() if setting.has_flag}

    @functools.wraps(verb)
    def command(**words: object) -> None:
        flag_values = {key: words.pop(name) for name, key in keys.items()}
        verb(**words, flag_values=flag_values)

    own = [one for one in inspect.signature(verb).parameters.values() if one.name != "flag_values"]
    flags = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(settings[key]))
        for name, key in keys.items()
    ]
    parameters = [*(one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own), *flags]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command


def further_settings(verb: str, kind: "type[Spec]") -> str:
    """A sentence that lists the settings without a flag and their defaults; empty if all have flags."""
    further = [
        f"{key} ({shown(setting.field.default)})" for key, setting in kind.settings().items() if not setting.has_flag
    ]
    return f"Further settings, in table {verb} of a --config file: {', '.join(further)}" if further else ""


def shown(default: object) -> str:
    """The text for a default value in help texts and documents."""
    if isinstance(default, tuple):
        return ", ".join(str(part) for part in default)
    return "none" if default is None else str(default)


def choices_of(annotation: Any) -> tuple[str, ...]:
    """The choices of a Literal type, also inside a union or a tuple; empty if the type has none."""
    if get_origin(annotation) is Literal:
        return tuple(str(choice) for choice in get_args(annotation))
    return next((found for part in get_args(annotation) if (found := choices_of(part))), ())


def value_type(annotation: Any) -> type:
    """The type of a flag's value on the command line; it is str for a list, which is written with commas."""
    if get_origin(annotation) is Annotated:
        return value_type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return next(value_type(part) for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is Literal:
        return type(get_args(annotation)[0])
    return annotation if annotation in (bool, int, float, Path) else str


def flag_of(setting: "Setting") -> str:
    """The flag of a setting, such as "--max-steps"."""
    return f"--{setting.key.replace('_', '-')}"


def _beginning_with(incomplete: str, choices: tuple[str, ...]) -> list[str]:
    """The choices that the shell offers for a value; in a list, for the part after its last comma."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{choice}" for choice in choices if choice.startswith(last)]


def _parameter(key: str) -> str:
    """The parameter name for a setting: its key, with "_" added if the key is a Python keyword, such as `as`."""
    return f"{key}_" if iskeyword(key) else key


def _annotation(setting: "Setting") -> Any:
    """The annotation from which typer makes the flag of a setting: its type, help and choices."""
    field, flag = setting.field, flag_of(setting)
    default = "" if field.default in (None, False) else f" [dim](default {shown(field.default)})[/]"
    choices = choices_of(field.annotation)
    wide = len("|".join(choices)) > _WIDEST_CHOICES
    named = f": {', '.join(choices)}" if wide else ""
    kind = value_type(field.annotation)
    option = typer.Option(
        f"{flag}/--no-{flag.removeprefix('--')}" if kind is bool else flag,
        help=f"{field.description}{named}{default}",
        autocompletion=(lambda incomplete: _beginning_with(incomplete, choices)) if choices else None,
        metavar="<choice>" if wide else "|".join(choices) or None,
        rich_help_panel=PANEL,
    )
    return Annotated[kind | None, option]
