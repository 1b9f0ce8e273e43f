"""How long work tells its caller where it is: events to a callback, so that stages know nothing of terminals."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Event:
    """Where a stage is: `done` of `total` steps, with facts to show beside (loss, tokens per second, ...)."""

    stage: str
    done: int
    total: int | None = None
    facts: Mapping[str, float | str] = field(default_factory=dict)


Progress = Callable[[Event], None]


def silent(event: Event) -> None:
    """The default: say nothing."""
