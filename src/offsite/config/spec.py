"""The base class of every spec (the settings of one verb), and its parts: groups, settings and rules.

A spec is built from a flat mapping of keys to values. In code a setting is read from its group, such as
`spec.optimizer.lr`. In TOML files, on the command line, in recipes and in Python's keyword arguments only its key is
written, such as `lr`. A key is unique within a verb.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.fields import FieldInfo


class Settings(BaseModel):
    """A frozen group of settings in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FileOnly:
    """A mark in a setting's annotation: the setting has no command-line flag, but can be set in TOML and in Python."""


FILE_ONLY = FileOnly()


@dataclass(frozen=True)
class Setting:
    """One setting of a verb (a command such as `tune`), and where its value is in the spec of the verb."""

    key: str  # its name in a TOML file; the flag is the same with dashes
    group: str | None  # the attribute of the spec that contains the group; None: the setting is in no group
    name: str  # the attribute of the group, or of the spec
    field: FieldInfo

    @property
    def has_flag(self) -> bool:
        """Whether the setting has a command-line flag."""
        return not any(isinstance(mark, FileOnly) for mark in self.field.metadata)

    def of(self, spec: "Spec") -> Any:
        """The value of this setting in `spec`."""
        return getattr(spec if self.group is None else getattr(spec, self.group), self.name)


class RulesError(ValueError):
    """Settings contradict each other; `messages` has one message for each broken rule."""

    def __init__(self, messages: Sequence[str]) -> None:
        super().__init__("; ".join(messages))
        self.messages = tuple(messages)


Check = Callable[[Any], None]


def rule(check: Check) -> Check:
    """Decorator: mark a spec's method as a rule about combinations of settings; every new spec is checked with it.

    Args:
        check: raises ValueError if the rule is broken. Its docstring states the rule for the reference page.
    """
    check.__dict__[_IS_RULE] = True
    return check


_IS_RULE = "is_rule_of_settings"


class Spec(Settings):
    """Base class of the settings of one verb, such as `TuneSpec`.

    The constructor accepts the settings by key, without their groups.
    """

    # Sets of keys that set the same thing in different ways: setting one of them replaces the others.
    alternatives: ClassVar[tuple[tuple[tuple[str, ...], ...], ...]] = ()

    @classmethod
    def settings(cls) -> Mapping[str, Setting]:
        """All settings of the spec, by key: first those outside of groups, then group by group."""
        return _settings(cls)

    @classmethod
    def keys_of(cls, *groups: str) -> frozenset[str]:
        """The keys of all settings in the groups with these names."""
        return frozenset(key for key, setting in _settings(cls).items() if setting.group in groups)

    @classmethod
    def rules(cls) -> tuple[Check, ...]:
        """The methods with the decorator `rule`, in the order in which the class defines them."""
        return tuple(check for check in vars(cls).values() if _IS_RULE in getattr(check, "__dict__", {}))

    @classmethod
    def group_places(cls) -> frozenset[tuple[str]]:
        """For each group, the first entry of pydantic's error locations (`loc`) in it: its name, as a tuple of one."""
        return frozenset((name,) for name in _groups(cls))

    @model_validator(mode="after")
    def _keep_rules(self) -> Self:
        """Validator: run every rule, and raise RulesError with the messages of all broken ones."""
        broken = []
        for check in type(self).rules():
            try:
                check(self)
            except ValueError as problem:
                broken.append(str(problem))
        if broken:
            raise RulesError(broken)
        return self

    @model_validator(mode="before")
    @classmethod
    def _sort_into_groups(cls, content: object) -> object:
        """Validator: put each flat key into its group; an unknown key remains at the top, and pydantic refuses it."""
        if not isinstance(content, Mapping):
            return content
        settings, groups = _settings(cls), _groups(cls)
        nested: dict[str, Any] = {}
        for key, value in content.items():
            setting = settings.get(key)
            if setting is None and key in groups:
                keys = ", ".join(one.key for one in settings.values() if one.group == key)
                raise ValueError(f"{key!r} is a group, not a setting: give its settings by their names, {keys}")
            if setting is None or setting.group is None:
                nested[key] = value
            else:
                nested.setdefault(setting.group, {})[key] = value
        return nested

    @classmethod
    def overlaid(cls, below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
        """Merge two mappings of settings by key into one; where both have a key, the value in `above` is used.

        A key in `above` also removes its `alternatives` from `below`: `max_steps` removes `epochs`, for example.
        """
        replaced = {
            key
            for sides in cls.alternatives
            for side in sides
            if any(above.get(key) is not None for other in sides if other != side for key in other)
            for key in side
        }
        return {key: value for key, value in below.items() if key not in replaced} | dict(above)

    @property
    def explicit_keys(self) -> frozenset[str]:
        """Keys of the settings that were set explicitly, even if the value equals the default."""
        return frozenset(
            setting.key
            for setting in _settings(type(self)).values()
            if setting.name in (self if setting.group is None else getattr(self, setting.group)).model_fields_set
        )

    def values(self) -> dict[str, Any]:
        """The values of all settings, by key."""
        return {key: setting.of(self) for key, setting in _settings(type(self)).items()}

    def flat(self, *, explicit_only: bool = False, without: Sequence[str] | frozenset[str] = ()) -> dict[str, Any]:
        """The settings as one flat mapping of keys to values in JSON types; the constructor and `changed` accept it.

        Args:
            explicit_only: leave out the settings that were not set explicitly.
            without: keys to leave out.
        """
        plain = self.model_dump(mode="json", by_alias=True)
        chosen = self.explicit_keys if explicit_only else _settings(type(self)).keys()
        return {
            key: plain[key] if setting.group is None else plain[setting.group][key]
            for key, setting in _settings(type(self)).items()
            if key in chosen and key not in without
        }

    def changed(self, settings: Mapping[str, Any]) -> Self:
        """Return a copy with some settings replaced, checked like any spec.

        Args:
            settings: new values by key.

        Raises:
            ValidationError: a value is wrong, or contradicts another setting.
        """
        return type(self).model_validate(type(self).overlaid(self.flat(explicit_only=True), settings))


S = TypeVar("S", bound=Spec)


@cache
def _groups(kind: type[Spec]) -> dict[str, type[Settings]]:
    """The class of each group of a spec class, by the name of the attribute for the group."""
    return {
        name: field.annotation
        for name, field in kind.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings)
    }


@cache
def _settings(kind: type[Spec]) -> dict[str, Setting]:
    """All settings of a spec class, by key; TypeError if two have the same key."""
    groups = _groups(kind)
    listed = [
        Setting(field.alias or name, group, name, field)
        for group, holder in [(None, kind), *groups.items()]
        for name, field in holder.model_fields.items()
        if not (group is None and name in groups)
    ]
    settings = {setting.key: setting for setting in listed}
    if len(settings) < len(listed):
        raise TypeError(f"{kind.__name__} has two settings of one key")
    return settings
