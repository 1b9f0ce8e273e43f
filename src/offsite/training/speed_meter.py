"""The speed of a run over its last steps, and the time left."""

import collections
import time

_STEPS = 20  # over which speed and time left are averaged


class SpeedMeter:
    """Counts the units (tokens or images) and seconds of the last steps; time outside steps can be excluded."""

    def __init__(self) -> None:
        self._steps: collections.deque[tuple[float, float]] = collections.deque(maxlen=_STEPS)
        self._since = time.perf_counter()

    def add(self, units: float) -> None:
        """Count a step that has just ended."""
        now = time.perf_counter()
        self._steps.append((units, now - self._since))
        self._since = now

    def restart(self) -> None:
        """Exclude the time since the last step from the measurement."""
        self._since = time.perf_counter()

    @property
    def per_second(self) -> float:
        """Units per second, rounded to a tenth."""
        return round(sum(units for units, _ in self._steps) / max(self._seconds, 1e-9), 1)

    def seconds_left(self, steps: int) -> float:
        """Estimated seconds for `steps` further steps."""
        return steps * self._seconds / max(1, len(self._steps))

    @property
    def _seconds(self) -> float:
        return sum(seconds for _, seconds in self._steps)
