"""When a run takes in workers that have come: not at once, and only where it pays.

To lose workers is no choice; to take some in is one, and costs a stop. Machines that come and go would make a run stop all
the time, so there has to be room for `elastic.grow_after_s` without a break, node by node:

    node a   ████████████████████          steady: what was there all along, here a alone;
    node b       ███████     █████         b counts when it has stayed for long enough
             ──────────────┬─────┬─ now
                           └─────┘ grow_after_s

and the faster steps have to make up for the stop within `elastic.pays_within_s`, or within the time that the mesh is
expected to last where that is shorter:   (time − stop) · old step / new step > time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from raytron.config import ElasticConfig
from raytron.plan.elastic import Resized


class Verdict(NamedTuple):
    """What to grow to, or nothing, and why."""

    resized: Resized | None
    why: str


class Growth:
    """Watches the room on a cluster. Times are seconds of one clock, which the caller reads."""

    def __init__(self, config: ElasticConfig):
        self.config = config
        self._seen: deque[tuple[float, dict[str, int]]] = deque()

    def saw(self, now_s: float, room: Mapping[str, int]) -> None:
        """How many workers each node has room for, those at work included."""
        self._seen.append((now_s, dict(room)))
        start = now_s - self.config.grow_after_s
        while len(self._seen) > 1 and self._seen[1][0] <= start:  # what held when the window began stays
            self._seen.popleft()

    def steady(self, now_s: float) -> dict[str, int]:
        """The workers that each node has had room for in all of the last grow_after_s; none before that has passed."""
        if not self._seen or self._seen[0][0] > now_s - self.config.grow_after_s:
            return {}
        rooms = [room for _, room in self._seen]
        return {node: min(room.get(node, 0) for room in rooms) for node in rooms[-1]}

    def look(
        self,
        now_s: float,
        current: Resized,
        search: Callable[[tuple[int, ...]], Resized],
        stop_s: float,
        expected_s: float | None = None,
    ) -> Verdict:
        """Whether to grow now.

        search: the best plan for workers on each node; stop_s: how long the last change of mesh took; expected_s: how long
        a mesh lasts, None: not known.
        """
        room = tuple(count for count in self.steady(now_s).values() if count)
        world = current.plan.mesh.world
        if self.config.most(sum(room)) <= world:
            return Verdict(None, f"no steady room for more than {world} workers")
        best = search(room)
        mesh, gain = best.plan.mesh, current.length / best.length
        time_s = self.config.pays_within_s if expected_s is None else min(expected_s, self.config.pays_within_s)
        if (time_s - stop_s) * gain <= time_s:
            faster = f"{mesh} would be {100 * (gain - 1):.1f} % faster"
            return Verdict(None, f"{faster}, which does not make up for {stop_s:.1f} s within {time_s:.0f} s")
        return Verdict(best, f"{mesh} is {100 * (gain - 1):.1f} % faster, and there has been room for long enough")
