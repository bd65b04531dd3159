"""Tells a leap of the loss or of the gradient norm from their usual noise, without a model of either.

Usual is the median of the last `window` steps; how far values stray from it is their median absolute deviation (MAD), times
1.4826 so that it is the standard deviation where they are normally distributed. Both ignore up to half of the window, so a
leap does not hide the next one, and a loss that falls is never one:

    leap  ⇔  value > median + limit · max(1.4826 · MAD, 2 % of the median)

After a lasting change of level half a window passes until the new level is usual. The state is a function of the values
seen, so a run that goes on from a checkpoint decides as it would have; it is written as fp32 numbers, in text of one length
from the first step on.
"""

from __future__ import annotations

import base64
import math
import statistics
import struct
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

LEAST = 0.02  # of the median: a series without noise has no leaps of less than `limit` times this
LARGEST = 3e38  # of fp32
NORMAL = 1.4826  # standard deviation over MAD of a normal distribution


class SpikeDetector:
    """Looks at values by name, one of each for every step.

    limit: in robust standard deviations; window: steps, at least 2.
    """

    def __init__(self, names: Iterable[str], limit: float, window: int):
        self.limit, self.window = limit, window
        self.seen: dict[str, deque[float]] = {name: deque(maxlen=window) for name in names}

    def leaps(self, values: Mapping[str, float]) -> dict[str, str]:
        """Each value that is a leap, with what would have been usual. Nothing while half the window is empty."""
        return {name: text for name in self.seen if (text := self._leap(name, values[name])) is not None}

    def _leap(self, name: str, value: float) -> str | None:
        seen = self.seen[name]
        if 2 * len(seen) < self.window:
            return None
        middle = statistics.median(seen)
        spread = max(NORMAL * statistics.median(abs(x - middle) for x in seen), LEAST * abs(middle))
        if spread == 0 or not value > middle + self.limit * spread:
            return None
        return f"{name} {value:.4g} where {middle:.4g} ± {spread:.2g} is usual"

    def saw(self, values: Mapping[str, float]) -> None:
        """A step's values; those that are not finite are passed over."""
        for name, seen in self.seen.items():
            if math.isfinite(values[name]):
                seen.append(struct.unpack("<f", _packed([min(max(values[name], -LARGEST), LARGEST)]))[0])

    def facts(self) -> dict[str, str]:
        """The state, for JSON: base64 of fp32 numbers, NaN where the window is empty yet."""
        return {
            name: base64.b64encode(_packed([math.nan] * (self.window - len(seen)) + [*seen])).decode()
            for name, seen in self.seen.items()
        }

    def restore(self, facts: Mapping[str, str]) -> None:
        """Goes on from `facts` of another detector; of a longer window the newest values count."""
        for name, seen in self.seen.items():
            numbers = struct.iter_unpack("<f", base64.b64decode(facts.get(name, "")))
            seen.clear()
            seen.extend(value for (value,) in numbers if not math.isnan(value))


def _packed(values: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)
