"""Measures the speed of a run over its last steps, and estimates the time left."""

import collections
import time

_STEPS = 20  # speed and time left are averages over this number of steps


class SpeedMeter:
    """Counts the units (tokens or images) and the seconds of the last 20 steps.

    `restart` excludes time between steps, such as a validation.
    """

    def __init__(self) -> None:
        self._steps: collections.deque[tuple[float, float]] = collections.deque(maxlen=_STEPS)
        self._since = time.perf_counter()

    def add(self, units: float) -> None:
        """Count a step that has just ended; `units` is its number of tokens or images."""
        now = time.perf_counter()
        self._steps.append((units, now - self._since))
        self._since = now

    def restart(self) -> None:
        """Exclude the time since the last step from the measurement."""
        self._since = time.perf_counter()

    @property
    def per_second(self) -> float:
        """Units (tokens or images) per second, rounded to a tenth."""
        return round(sum(units for units, _ in self._steps) / max(self._seconds, 1e-9), 1)

    def seconds_left(self, steps: int) -> float:
        """Estimate the seconds that `steps` more steps take."""
        return steps * self._seconds / max(1, len(self._steps))

    @property
    def _seconds(self) -> float:
        """The total duration of the counted steps, in seconds."""
        return sum(seconds for _, seconds in self._steps)
