"""Progress reports of long stages: events to a callback, so that stages do not depend on a terminal."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

NOTE = "note: "  # begins the stage of an event that is a remark for the user, and no part of the work


@dataclass(frozen=True)
class Event:
    """A report from a running stage: `done` of `total` steps are complete; `total` is None if it is unknown.

    `facts` are values to display, by name, such as the loss.
    """

    stage: str
    done: int
    total: int | None = None
    facts: Mapping[str, float | str] = field(default_factory=dict)


class Progress(Protocol):
    """A callback for the events of a stage: any function that takes an `Event`."""

    def __call__(self, event: Event, /) -> None:
        """Receive one event."""


def silent(event: Event) -> None:
    """Ignore the event; this is the default callback."""
