"""How long a rank waits for others: what is left of a step is its own work.

All ranks of a mesh take equally long for a step, since each waits for the slowest one. Who that is shows only in the time
that they do not wait. A `Mesh` owns one counter and hands it to its groups; the few places where a rank waits on the host
count there:

    with group.waiting:
        work.wait()

On CUDA a collective does not block the host; there the device's own clock tells (`raytron.observe.busy`).
"""

from __future__ import annotations

import time


class Waiting:
    """Adds up the seconds between entering and leaving; one thread at a time."""

    __slots__ = ("_since", "seconds")

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = 0.0

    @property
    def held(self) -> bool:
        """Whether this rank waits now, seen from any thread."""
        return self._since > 0

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.seconds += time.perf_counter() - self._since
        self._since = 0.0
