"""Which rank is slow: the one that is busy for much longer than its peers, again and again.

All ranks take equally long for a step; what tells is how long each was busy (`raytron.observe.busy`). A rank's peers are
those of its pipeline stage, which do the same work; where it has none, all others. A peer with less work is given the more
time; one with more work is not, since part of every step does not depend on how much there is.

    ratio of a step    busy time / median over peers of (busy time · more work), at most 2 · limit
    a step is high     its ratio comes to 80 % of the way from 1 to the limit
    slow               7 of the last 10 steps are high, or 16 of the last 40; and the mean ratio of those reaches the limit
    keeps pace again   at most 2 of the last 10 steps are high

One pause, however long, is one high step; so pauses now and then (garbage, a checkpoint, a busy disk) make nobody slow. A
rank at half speed is flagged after 7 steps; the longer window finds one that is slow every other step. Everything that all
ranks share (a longer batch, an evaluation) cancels out.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from raytron.plan.actions import Op
from raytron.plan.plan import Plan
from raytron.plan.weigh import stage_cost

RULES = ((10, 7), (40, 16))  # of so many steps, so many high ones
PACE = 2  # high steps of the shortest window that are nothing
LONGEST = max(window for window, _ in RULES)
LEAST_S = 0.005  # less than this more than the peers is nothing
PENDING = 1000  # steps of which not all ranks have been heard yet


class Change(NamedTuple):
    """A rank became slow, or is no more."""

    rank: int
    slow: bool
    step: int  # at which it was seen
    since: int  # the first step of the last ones that was slow; of a rank that is no more slow, of its flag
    ratio: float  # mean of the last steps, each at most twice the limit
    peers: tuple[int, ...]

    def __str__(self) -> str:
        whom = f"{'its peers, ' if len(self.peers) > 1 else ''}rank{'s' * (len(self.peers) > 1)} "
        whom += ", ".join(map(str, self.peers[:4])) + (", …" if len(self.peers) > 4 else "")
        if not self.slow:
            return f"rank {self.rank} keeps pace again with {whom} ({self.ratio:.1f} ×), at step {self.step}"
        return f"rank {self.rank} is busy {self.ratio:.1f} × as long as {whom}, since step {self.since}"


class Stragglers:
    """Watches the ranks of one mesh.

    stages: of each rank, a number that ranks with the same work share. work: of each rank in a step, in any unit.
    limit: more than 1.
    """

    def __init__(self, stages: Sequence[int], work: Sequence[float], limit: float):
        self.work, self.limit = tuple(work), limit
        everyone = range(len(stages))
        self.peers = {
            rank: tuple(r for r in everyone if r != rank and stages[r] == stages[rank])
            or tuple(r for r in everyone if r != rank)
            for rank in everyone
        }
        self.flagged: dict[int, Change] = {}
        self._ratios = {rank: deque([1.0] * LONGEST, LONGEST) for rank in everyone}
        self._steps: deque[int] = deque(maxlen=LONGEST)
        self._pending: dict[int, dict[int, float]] = {}

    @classmethod
    def of(cls, plan: Plan, limit: float) -> Stragglers:
        """Over the mesh of a plan."""
        shape, deal = plan.mesh, plan.config.deal(plan.config.global_batch_size)
        table = stage_cost(plan.config, plan.stages).table(len(plan.stages))
        loads = [0.0] * shape.pp
        for at, forward, backward in zip(plan.schedule.rank_of, table[Op.F], table[Op.B], strict=True):
            loads[at] += forward + backward
        coords = [shape.coords(rank) for rank in range(shape.world)]
        return cls([at.pp for at in coords], [loads[at.pp] * len(deal.of(at.dp)) for at in coords], limit)

    def heard(self, rank: int, steps: Iterable[tuple[int, float]]) -> list[Change]:
        """A rank told how long it was busy in some steps; what that changes once all ranks have told. Steps that were heard
        before are passed over."""
        last = self._steps[-1] if self._steps else -1
        for step, busy_s in steps:
            if step > last:
                self._pending.setdefault(step, {})[rank] = busy_s
        changes: list[Change] = []
        whole = [step for step in sorted(self._pending) if len(self._pending[step]) == len(self.work)]
        for step in whole:
            changes += self.saw(step, self._pending[step])
        if whole or len(self._pending) > PENDING:
            oldest = whole[-1] if whole else sorted(self._pending)[-PENDING]
            self._pending = {step: busy for step, busy in self._pending.items() if step > oldest}
        return changes

    def saw(self, step: int, busy_s: Mapping[int, float]) -> list[Change]:
        """All ranks' busy seconds of one step."""
        self._steps.append(step)
        changes = []
        for rank, peers in self.peers.items():
            if peers:
                self._ratios[rank].append(self._ratio(rank, peers, busy_s))
                changes += self._judge(rank, step)
        return changes

    def _ratio(self, rank: int, peers: Sequence[int], busy_s: Mapping[int, float]) -> float:
        usual = statistics.median(busy_s[peer] * max(1.0, self._more(rank, peer)) for peer in peers)
        if busy_s[rank] - usual < LEAST_S:
            return min(1.0, busy_s[rank] / usual) if usual > 0 else 1.0
        return min(busy_s[rank] / usual, 2 * self.limit) if usual > 0 else 2 * self.limit

    def _more(self, rank: int, peer: int) -> float:
        """How much more work a rank has than a peer."""
        return self.work[rank] / self.work[peer] if self.work[peer] else 1.0

    def _judge(self, rank: int, step: int) -> list[Change]:
        newest = [*reversed(self._ratios[rank])]
        high = [ratio >= 1.0 + 0.8 * (self.limit - 1.0) for ratio in newest]
        if rank in self.flagged:
            shortest = RULES[0][0]
            if sum(high[:shortest]) > PACE:
                return []
            since = self.flagged.pop(rank).since
            self._ratios[rank] = deque([1.0] * (LONGEST - shortest) + newest[shortest - 1 :: -1], LONGEST)
            return [Change(rank, False, step, since, statistics.fmean(newest[:shortest]), self.peers[rank])]
        for window, enough in RULES:
            mean = statistics.fmean(newest[:window])
            if sum(high[:window]) >= enough and mean >= self.limit:
                since = min(at for at, is_high in zip(reversed(self._steps), high[:window], strict=False) if is_high)
                self.flagged[rank] = Change(rank, True, step, since, mean, self.peers[rank])
                return [self.flagged[rank]]
        return []
