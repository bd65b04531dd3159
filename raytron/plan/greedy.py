"""Schedules that are found by running them: interleaved-zb, ZB-V, V-Half and V-Min, for any number of ranks,
micro-batches and any costs.

The ranks are played in time. Whenever a rank is free it takes the first of these that can start and that its memory admits:

    I   an input gradient: others wait for it, and it makes W possible
    F   a forward, of the deepest chunk that has one
    W   a weight gradient: nobody waits for it, but it frees the memory of its micro-batch

or F before I. Each rank has a limit of model chunks in flight (from F to W) and lower limits for its first chunks, so that
there is always room for the oldest micro-batch to go on: such a game can't stop, and what it did is the schedule.

A V (Qi et al., arXiv 2405.15362) places two chunks so that a rank that holds its first chunk for long holds its second one
briefly: all ranks need equal memory, which the limit can then trade for idle time. In micro-batches (two chunks each):

    zb-v     p        no bubble but the start-up, where F = I = W
    v-half   p/2 + 1  half the bubble of 1f1b
    v-min    p/3 + 1  two thirds of it

For v-half and v-min there is also a pattern for one micro-batch, repeated every 6 units of time, in which nothing collides:
forwards and input gradients are then taken in this order, and W in between. The best of a few ways to play, by makespan
with the given costs and then by the idle time within a rank's own span, is the schedule; the more actions there are, the
fewer ways are tried, on fewer micro-batches. ZB-V can also be written down (`v_row`), and the better of the two is taken.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from raytron.plan.actions import Action, Op, Row, Schedule, round_robin, v_shape
from raytron.plan.cost import UNIT, Cost
from raytron.plan.simulate import simulate
from raytron.plan.v_row import zb_v_as_written

BUDGET = 60_000  # actions of all ways that are tried
EPSILON = 1e-9  # of the longest action: what starts within it starts at once


class Way(NamedTuple):
    """How to play. limits: by rank, of chunks in flight among the first, the first two … of a rank's chunks.
    prefer: which operation goes first. deepest: of several input gradients the one of the deepest chunk goes first.
    orders: by rank, the forwards and input gradients in a fixed order; else as they can start.
    patience: a weight gradient waits where something else will be there within this share of its time.
    roomy: a forward of a first chunk leaves room for one of each deeper chunk, however few of its own chunk are in flight.
    """

    limits: tuple[tuple[int, ...], ...]
    prefer: tuple[Op, Op] = (Op.I, Op.F)
    deepest: bool = True
    orders: tuple[Row, ...] | None = None
    patience: float = 0.0
    roomy: bool = False


def interleaved_zb(pp: int, virtual_stages: int, microbatches: int, cost: Cost = UNIT) -> Schedule:
    """Interleaved 1F1B with the backward in two; in flight at most `pp` micro-batches of all of a rank's chunks."""
    total = pp * virtual_stages
    limits = (tuple(range(total - virtual_stages + 1, total + 1)),) * pp
    ways = [
        Way(limits, prefer, deepest, patience=patience, roomy=roomy)
        for patience in (0.0, 0.5)
        for roomy in (True, False)
        for prefer, deepest in (((Op.I, Op.F), True), ((Op.F, Op.I), True), ((Op.I, Op.F), False))
    ]
    return _best("interleaved-zb", round_robin(pp, virtual_stages), microbatches, cost, lambda count: ways)


def zb_v(pp: int, microbatches: int, cost: Cost = UNIT) -> Schedule:
    """No rank idles between its first action and its last where F = I = W; as much memory as 1F1B."""
    written = zb_v_as_written(pp, microbatches)
    table = cost.table(2 * pp)
    if written is not None and len({*table[Op.F], *table[Op.I], *table[Op.W]}) == 1:
        return written  # nothing is better
    ways = list(_v_ways(pp, 2 * pp))
    played = _best("zb-v", v_shape(pp), microbatches, cost, lambda count: ways)
    return played if written is None else min((written, played), key=lambda made: _spans(made, cost))


def v_half(pp: int, microbatches: int, cost: Cost = UNIT) -> Schedule:
    """About half of the memory of 1F1B and half of its bubble."""
    total = 2 * (pp // 2) + 2

    def ways(count: int) -> list[Way]:
        return [*_v_ways(pp, total), _pattern_way(pp, count, total, half=True)]

    return _best("v-half", v_shape(pp), microbatches, cost, ways)


def v_min(pp: int, microbatches: int, cost: Cost = UNIT) -> Schedule:
    """About a third of the memory of 1F1B and two thirds of its bubble, where F = I = W."""
    total = 2 * ((pp + 1) // 3) + 2

    def ways(count: int) -> list[Way]:
        return [_pattern_way(pp, count, total, half=False), *_v_ways(pp, total)]

    return _best("v-min", v_shape(pp), microbatches, cost, ways)


def _best(
    name: str, rank_of: tuple[int, ...], microbatches: int, cost: Cost, ways: Callable[[int], Sequence[Way]]
) -> Schedule:
    """The way with the shortest makespan, found on a part of the micro-batches and played on all of them."""
    part, all_ways = microbatches, ways(microbatches)
    if 3 * len(rank_of) * part * len(all_ways) > BUDGET:
        part = min(part, 3 * (max(rank_of) + 1))
    tries = ways(part)[: max(1, BUDGET // (3 * len(rank_of) * part))]
    chosen = 0
    if len(tries) > 1:
        played = [_Game(rank_of, part, cost, way).play() for way in tries]
        chosen = played.index(min(played))
    game = _Game(rank_of, microbatches, cost, all_ways[chosen])
    game.play()
    return Schedule(name, tuple(map(tuple, game.rows)), rank_of, microbatches)


def _spans(schedule: Schedule, cost: Cost) -> tuple[float, float]:
    """Makespan and own span, rounded: what schedules are compared by."""
    line = simulate(schedule, cost)
    return round(line.makespan, 6), round(line.own_span, 6)


def _v_ways(pp: int, total: int) -> Iterator[Way]:
    """Ways for a V with `total` chunks in flight: limits of the first chunk that fall from the first to the last rank."""
    high, half = total - 1, total // 2
    slopes = dict.fromkeys(
        [(high, half), (high, high), (high, min(high, half + 1)), (max(1, high - 2), min(half, high))]
    )
    plays = (((Op.F, Op.I), False), ((Op.I, Op.F), True), ((Op.F, Op.I), True), ((Op.I, Op.F), False))
    for patience, (prefer, deepest), (first, last) in itertools.product((0.0, 0.5), plays, slopes):
        limits = [(round(first + (last - first) * rank / max(1, pp - 1)), total) for rank in range(pp)]
        yield Way(tuple(limits), prefer, deepest, patience=patience)


def _pattern_way(pp: int, microbatches: int, total: int, *, half: bool) -> Way:
    """A micro-batch goes down, up, down and up the ranks, one rank in each unit of time; for v-half, two units down.

    Every 6 units the next one follows. The turns wait as long as it takes for no two of a rank's four actions (and two
    W) to fall on the same unit.
    """
    down, span = (2 if half else 1), pp - 1
    for waits in sorted(itertools.product(range(6), repeat=3), key=sum):
        up = down * span + 1 + waits[0] + span  # when the second chunk's forward is on rank 0
        back = up + 1 + waits[1]
        end = back + down * span + 1 + waits[2] + span
        times = [(down * r, up - r, back + down * r, end - r) for r in range(pp)]
        if all(len({time % 6 for time in row}) == 4 for row in times):
            break
    orders = []
    for rank, row in enumerate(times):
        low, high = rank, 2 * pp - 1 - rank
        block = zip(row, (Op.F, Op.F, Op.I, Op.I), (low, high, high, low), strict=True)
        timed = [(at + 6 * batch, Action(op, stage, batch)) for at, op, stage in block for batch in range(microbatches)]
        orders.append(tuple(action for _, action in sorted(timed)))
    return Way(((total, total),) * pp, orders=tuple(orders))


class _Game:
    """The ranks at play. All lists are by stage unless said otherwise; time is in the unit of the cost."""

    def __init__(self, rank_of: tuple[int, ...], microbatches: int, cost: Cost, way: Way):
        self.rank_of, self.microbatches, self.way, self.comm = rank_of, microbatches, way, cost.comm
        self.last = len(rank_of) - 1
        self.durations = cost.table(len(rank_of))
        self.unit = max(*self.durations[Op.F], *self.durations[Op.B]) or 1.0
        self.epsilon = EPSILON * self.unit
        ranks = range(max(rank_of) + 1)
        self.stages = [[stage for stage, rank in enumerate(rank_of) if rank == here] for here in ranks]  # by rank
        self.chunk = [self.stages[rank].index(stage) for stage, rank in enumerate(rank_of)]
        self.rows: list[list[Action]] = [[] for _ in ranks]  # by rank
        self.free = [0.0 for _ in ranks]  # by rank, when it is
        self.began = [0.0 for _ in ranks]  # by rank, its first action
        self.held = [0 for _ in rank_of]  # micro-batches in flight
        self.done = {op: [0] * len(rank_of) for op in (Op.F, Op.I, Op.W)}
        self.ready: dict[Op, list[list[float]]] = {
            op: [[] for _ in rank_of] for op in (Op.F, Op.I)
        }  # when they can start
        self.ready[Op.F][0] = [0.0] * microbatches
        self.events = [(0.0, rank) for rank in ranks]  # a heap: when a rank may find something to do
        self.place = [0 for _ in ranks]  # by rank, in its order

    def play(self) -> tuple[float, float]:
        """Fills the rows; returns the makespan, and how long a rank idles at most between its first action and its last."""
        while self.events:
            now, rank = heapq.heappop(self.events)
            if self.free[rank] <= now + self.epsilon:
                chosen = self._ordered(rank, now) if self.way.orders else self._chosen(rank, now)
                if chosen is not None:
                    self._do(*chosen, rank, now)
        played = sum(map(len, self.rows))
        assert played == 3 * len(self.rank_of) * self.microbatches, "a game stopped before its end"
        makespan, idle = max(self.free), max(map(self._idle, range(len(self.rows))))
        return round(makespan / self.unit, 6), round(idle / self.unit, 6)

    def _idle(self, rank: int) -> float:
        busy = sum(self.durations[op][stage] for stage in self.stages[rank] for op in (Op.F, Op.B)) * self.microbatches
        return self.free[rank] - self.began[rank] - busy

    def _chosen(self, rank: int, now: float) -> tuple[Op, int] | None:
        """What a rank does now: its operation and stage."""
        soon = now + self.epsilon
        coming = float("inf")
        for op in self.way.prefer:
            found = None
            for stage in self.stages[rank]:
                at, times = self.done[op][stage], self.ready[op][stage]
                if at == len(times) or (op is Op.F and not self._admits(rank, stage)):
                    continue
                if times[at] > soon:
                    coming = min(coming, times[at])
                elif found is None or op is Op.F or self.way.deepest:
                    found = stage
            if found is not None:
                return op, found
        return self._weights(rank, now, coming)

    def _ordered(self, rank: int, now: float) -> tuple[Op, int] | None:
        """What a rank with a fixed order does now."""
        assert self.way.orders is not None
        order, at = self.way.orders[rank], self.place[rank]
        coming = float("inf")
        if at < len(order):
            op, stage, batch = order[at]
            times = self.ready[op][stage]
            if batch < len(times) and (op is Op.I or self._admits(rank, stage)):
                if times[batch] <= now + self.epsilon:
                    self.place[rank] += 1
                    return op, stage
                coming = times[batch]
        return self._weights(rank, now, coming)

    def _weights(self, rank: int, now: float, coming: float) -> tuple[Op, int] | None:
        """The oldest weight gradient, unless something else is there very soon."""
        waiting = [stage for stage in self.stages[rank] if self.done[Op.W][stage] < self.done[Op.I][stage]]
        if not waiting:
            return None
        stage = min(waiting, key=lambda stage: (self.done[Op.W][stage], -stage))
        if coming - now < self.way.patience * self.durations[Op.W][stage]:
            return None
        return Op.W, stage

    def _admits(self, rank: int, stage: int) -> bool:
        """Whether one more forward stays within the limits of its chunk and of those above it."""
        limits, held, stages = self.way.limits[rank], 0, self.stages[rank]
        for chunk, (limit, other) in enumerate(zip(limits, stages, strict=True)):
            held += self.held[other]
            if chunk >= self.chunk[stage] and held >= limit:
                return False
        return not self.way.roomy or held < limits[self.chunk[stage]]

    def _do(self, op: Op, stage: int, rank: int, now: float) -> None:
        end = now + self.durations[op][stage]
        if not self.rows[rank]:
            self.began[rank] = now
        self.rows[rank].append(Action(op, stage, self.done[op][stage]))
        self.done[op][stage] += 1
        self.free[rank] = end
        heapq.heappush(self.events, (end, rank))
        if op is Op.W:
            self.held[stage] -= 1
            return
        if op is Op.F:
            self.held[stage] += 1
        if op is Op.F and stage == self.last:
            self.ready[Op.I][stage].append(end)
            return
        target = stage + (1 if op is Op.F else -1)
        if target >= 0:
            arrival = end if self.rank_of[target] == rank else end + self.comm
            self.ready[op][target].append(arrival)
            heapq.heappush(self.events, (arrival, self.rank_of[target]))
