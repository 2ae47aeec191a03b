"""The clock: what is timed, and the decision about the cap."""

from __future__ import annotations

import statistics
import time
from collections import deque


class Clock:
    """Counts train_time_s: the time of the optimizer steps, with data, forward, backward, optimizer and averages.

    It runs from the first step to the last. Only the session stops it, for validation and checkpoints, once the device
    has finished the steps before; what a script does between two calls of the session is counted.
    Compilation and warm-up come before the first step and are not counted.
    """

    now = staticmethod(time.perf_counter)

    def __init__(self):
        self.train_time_s = 0.0
        self.recent_s: deque[float] = deque(maxlen=5)  # durations of the last steps
        self.since: float | None = None  # None while stopped

    @property
    def running(self) -> bool:
        return self.since is not None

    def start(self) -> None:
        """Start the clock; no effect if it is running."""
        if not self.running:
            self.since = self.now()

    def stop(self) -> None:
        """Count the time since the last lap, but not as a step, and stop; no effect if the clock is stopped."""
        if self.running:
            self.train_time_s += self.now() - self.since
            self.since = None

    def lap(self) -> float:
        """Count the time since the start or the last lap as one step, and return it."""
        now = self.now()
        lap_s = now - self.since
        self.since = now
        self.train_time_s += lap_s
        self.recent_s.append(lap_s)
        return lap_s

    @property
    def step_s(self) -> float:
        """The median duration of the last steps; 0 before the first."""
        return statistics.median(self.recent_s) if self.recent_s else 0.0

    def next_step_exceeds(self, cap_s: float, steps_in_flight: int) -> bool:
        """Whether the next step would end past the cap, at the median duration of the last steps; 0 for no cap.

        steps_in_flight: steps that have been started and are not counted yet.
        """
        if not cap_s or not self.recent_s:
            return False
        return self.train_time_s + (steps_in_flight + 1) * self.step_s > cap_s


def duration(seconds: float) -> str:
    """Seconds in the unit a reader would choose, such as "48.0m"."""
    if seconds > 7200:
        return f"{seconds / 3600:.1f}h"
    return f"{seconds / 60:.1f}m" if seconds > 90 else f"{seconds:.0f}s"
