"""Records of steps that the driver may not have heard of, kept beside the state in memory.

    the driver    hears of 1 … 4                                   hears of 5 … 7, from memory, and goes on with 8
    rank 0        1   2   3   4   5   6   7 ✗ all ranks die          ▲
    its segment       ┆       ┆   5  5,6 5,6,7 ──────────────────────┘   records since the newest one that it knows of

The driver asks for records twice a second, and steps may be much shorter. So rank 0's segment of a step carries the records
of all steps that may still be unheard: whoever finds the segment can tell the whole story up to its step, and none has to
be done again for the sake of its record alone.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from itertools import takewhile

from raytron.observe.records import Record


class Journal:
    """Of one rank. known: the newest step that the driver has heard of; most: bytes of all lines together."""

    def __init__(self, known: Callable[[], int], most: int):
        self.known, self.most = known, most
        self._lines: deque[tuple[int, bytes]] = deque()  # step, and its record as JSON
        self._bytes = 0

    def add(self, record: Record) -> None:
        """A step is committed; of records that are too many the oldest go."""
        line = _line(record)
        self._lines.append((int(record["step"]), line))
        self._bytes += len(line) + 1
        known = self.known()
        while self._lines and (self._lines[0][0] <= known or self._bytes > self.most):
            self._bytes -= len(self._lines.popleft()[1]) + 1

    def lines(self, up_to: int, last: Record | None = None) -> list[bytes]:
        """The newest records of steps up to one, oldest first. last: that of a step which has not been added yet."""
        known, room = self.known(), self.most
        held = [line for step, line in self._lines if known < step <= up_to]
        newest = [_line(last)] if last is not None else []

        def fits(line: bytes) -> bool:
            nonlocal room
            room -= len(line) + 1
            return room >= 0

        return [*takewhile(fits, [*newest, *reversed(held)])][::-1]


def _line(record: Record) -> bytes:
    """Numbers that are not finite stay what they are."""
    return json.dumps({key: value for key, value in record.items() if key != "request"}).encode()
