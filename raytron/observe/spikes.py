"""Tells a leap of the loss or of the gradient norm from their usual noise, without a model of either.

Usual is the median of the last `window` steps; how far values stray from it is their median absolute deviation (MAD), times
1.4826 so that it is the standard deviation where they are normally distributed. Both ignore up to half of the window, so a
leap does not hide the next one, and a loss that falls is never one:

    leap  ⇔  value > median + limit · max(1.4826 · MAD, 2 % of the median)

After a lasting change of level half a window passes until the new level is usual. The state is a function of the values
seen, so a run that goes on from a checkpoint decides as it would have.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence

LEAST = 0.02  # of the median: a series without noise has no leaps of less than `limit` times this
NORMAL = 1.4826  # standard deviation over MAD of a normal distribution


class SpikeDetector:
    """Looks at named values, one of each for every step. limit: in robust standard deviations; window: steps, at least 2."""

    def __init__(self, limit: float, window: int):
        self.limit, self.window = limit, window
        self.seen: dict[str, deque[float]] = {}

    def leaps(self, values: Mapping[str, float]) -> dict[str, str]:
        """Each value that is a leap, with what would have been usual. Nothing while half the window is empty."""
        return {name: text for name, value in values.items() if (text := self._leap(name, value)) is not None}

    def _leap(self, name: str, value: float) -> str | None:
        seen = self.seen.get(name, ())
        if 2 * len(seen) < self.window:
            return None
        middle = statistics.median(seen)
        spread = max(NORMAL * statistics.median(abs(x - middle) for x in seen), LEAST * abs(middle))
        if spread == 0 or not value > middle + self.limit * spread:
            return None
        return f"{name} {value:.4g} where {middle:.4g} ± {spread:.2g} is usual"

    def saw(self, values: Mapping[str, float]) -> None:
        """A step's values; those that are not finite are passed over."""
        for name, value in values.items():
            if math.isfinite(value):
                self.seen.setdefault(name, deque(maxlen=self.window)).append(value)

    def facts(self) -> dict[str, list[float]]:
        """The state, for JSON."""
        return {name: list(values) for name, values in self.seen.items()}

    def restore(self, facts: Mapping[str, Sequence[float]]) -> None:
        self.seen = {name: deque(map(float, values), maxlen=self.window) for name, values in facts.items()}
