"""How long to wait before something counts as lost: limits that learn from what the run itself takes.

A limit that is too short kills a healthy rank; one that is too long leaves a dead run standing. So limits follow the times
that were seen, and each watcher gives the one inside it the time to speak first:

    heartbeat  <  progress  <  collective  <  build, load

    heartbeat   a process does not answer a call of its control thread: it is stopped, or holds its interpreter's lock
    progress    a rank answers, but its step does not end: max(5 s, 3 × the 99th percentile of steps)
    collective  the timeout of the process groups: the last word, spoken by the ranks themselves
    build, load what is done once in each life of a mesh

A step may be slow for a reason: the first one compiles and allocates, a save or an evaluation is no step. Those are phases
with times of their own, so that they neither lengthen the limit of a step nor are cut off by it. What was never seen gets
`unknown_s`. One long step does not lengthen the limit either: of eight steps or more the longest is left out.
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

FLOOR_S = 5.0  # no watchdog of steps is more impatient
FRESH_S = 20.0  # nor one of building and loading, in which a process that is new imports what others have long had
MARGIN = 3.0  # times the longest that is usual
ENOUGH = 8  # samples from which on the longest may be a slip
FIRST, STEP, SAVING, EVALUATION, BUILDING, LOADING = "first step", "step", "saving", "evaluation", "building", "loading"
WITHIN_GROUPS = (FIRST, STEP, SAVING, EVALUATION)  # phases in which ranks wait for each other in a collective


class Limits(NamedTuple):
    """Seconds, each more than the one before, but for the last two, which are both more than `collective`."""

    heartbeat: float
    progress: float  # of the phase that ranks are in
    collective: float
    build: float
    load: float


class Patience:
    """The times of one run, and the limits that follow from them.

        patience = Patience(unknown_s=120)
        patience.begin()                           # a mesh was built
        patience.saw("step", 0.4)
        patience.limits().progress                 # 5.0

    unknown_s: the limit of a phase that was never seen. heartbeat_s: the shortest silence that means anything.
    window: of each phase, so many times are remembered.
    """

    def __init__(self, unknown_s: float = 120.0, heartbeat_s: float = 2.0, window: int = 300):
        self.unknown_s, self.heartbeat_s, self.window = unknown_s, heartbeat_s, window
        self._times: dict[str, deque[float]] = {}
        self._answers: deque[float] = deque(maxlen=window)
        self._warm = False

    def begin(self, slower: float = 1.0) -> None:
        """A mesh begins its life; its next step is a first one.

        slower: how much more a rank has to do than in the mesh before, such as ranks before / ranks now.
        """
        self._warm = False
        for times in self._times.values():
            for index, seconds in enumerate(times):
                times[index] = seconds * max(1.0, slower)

    def saw(self, phase: str, seconds: float) -> None:
        """A phase ended well after so many seconds: "step", "saving", "evaluation", "building", "loading"."""
        if phase == STEP and not self._warm:
            self._warm, phase = True, FIRST
        self._times.setdefault(phase, deque(maxlen=self.window)).append(seconds)

    def answered(self, seconds: float) -> None:
        """A rank answered a call of its control thread after so many seconds."""
        self._answers.append(seconds)

    def limit(self, phase: str) -> float:
        """Seconds that a phase may take."""
        phase = FIRST if phase == STEP and not self._warm else phase
        seen = self._times.get(phase)
        if not seen:
            return max(floor(phase), self.unknown_s)
        known = max(floor(phase), MARGIN * usual(seen))
        if phase == STEP:  # until there is enough of it, a step is trusted as little as the first one
            return known if len(seen) >= ENOUGH else max(known, self.limit(FIRST))
        return known

    def limits(self, phase: str = STEP) -> Limits:
        """What holds now, for ranks that are in some phase."""
        progress = self.limit(phase)
        collective = 2.0 * max(progress, *map(self.limit, WITHIN_GROUPS))
        heartbeat = max(self.heartbeat_s, MARGIN * usual(self._answers))
        longer = (max(2.0 * collective, self.limit(phase)) for phase in (BUILDING, LOADING))
        return Limits(min(heartbeat, 0.6 * progress), progress, collective, *longer)


def floor(phase: str) -> float:
    """The least that any limit of a phase is, in seconds."""
    return FLOOR_S if phase in WITHIN_GROUPS else FRESH_S


def usual(seconds: deque[float]) -> float:
    """The 99th percentile; of eight samples or more never the longest. 0 for none."""
    if not seconds:
        return 0.0
    rank = math.ceil(0.99 * len(seconds))
    return sorted(seconds)[min(rank, max(1, len(seconds) - (len(seconds) >= ENOUGH))) - 1]
