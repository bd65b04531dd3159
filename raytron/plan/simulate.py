"""Runs a schedule on paper: proves that it ends, and measures its bubble and its memory.

An action starts when its rank has ended the one before it and its message is there:

    F of stage s needs the F of stage s-1           B or I of stage s needs the B or I of stage s+1

Messages between two ranks travel in one in-order channel for each direction, as on NCCL: they leave in the order of the
sender's row, as soon as the action that makes them ends, without holding up the sender, and arrive `comm` later but never
before an earlier one. A receiver that needs a later message takes the earlier ones out first and keeps them in a stash; how
many it keeps at most is reported. Under this model a schedule can stop only where ranks wait for each other in a circle,
which is reported as who waits for whom. The runtime moves messages in the same way, so what ends here ends there.

Every action is visited once and woken at most once: the time taken is linear in the number of actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from raytron.errors import ScheduleError
from raytron.plan.actions import Action, Op, Row, Schedule
from raytron.plan.cost import UNIT, Cost

__all__ = ["Cost", "Timeline", "peak", "simulate"]


@dataclass(frozen=True)
class Timeline:
    """When every action of a schedule runs; times in the unit of the cost, all lists by rank.

    start and end have the shape of the schedule's rows. peak_at_input_grad and peak_at_weight_grad count how many
    micro-batches (of one stage each) a rank holds at most, if it frees them at I or at W (B is both at once); stash, how
    many messages it has taken in early at most.
    """

    start: tuple[tuple[float, ...], ...]
    end: tuple[tuple[float, ...], ...]
    busy: tuple[float, ...]
    peak_at_input_grad: tuple[int, ...]
    peak_at_weight_grad: tuple[int, ...]
    stash: tuple[int, ...]

    @property
    def makespan(self) -> float:
        """From the first start to the last end."""
        return max(chain.from_iterable(self.end), default=0.0)

    @property
    def bubble_time(self) -> float:
        """How long the busiest rank is idle before the last rank has ended."""
        return self.makespan - max(self.busy)

    @property
    def bubble(self) -> float:
        """The share of the makespan in which the busiest rank is idle."""
        return self.bubble_time / self.makespan if self.makespan else 0.0

    @property
    def own_span_bubble_time(self) -> float:
        """The longest idle time of a rank between its own first start and its own last end."""
        spans = zip(self.start, self.end, self.busy, strict=True)
        return max(end[-1] - start[0] - busy for start, end, busy in spans if end)

    @property
    def own_span(self) -> float:
        """The longest time of a rank from its own first start to its own last end: what a step takes where no rank waits
        for the others between two steps."""
        return max((end[-1] - start[0] for start, end in zip(self.start, self.end, strict=True) if end), default=0.0)

    @property
    def mean_idle(self) -> float:
        """The share of the makespan in which a rank is idle, on average over the ranks."""
        return sum(map(self.idle, range(len(self.busy)))) / len(self.busy)

    def idle(self, rank: int) -> float:
        """The share of the makespan in which one rank is idle."""
        return 1 - self.busy[rank] / self.makespan if self.makespan else 0.0


def simulate(schedule: Schedule, cost: Cost = UNIT) -> Timeline:
    """The times of all actions. Raises ScheduleError naming who waits for whom where the schedule would never end."""
    return _Simulation(schedule, cost).run()


def peak(row: Row, release: Op = Op.W, weight: Sequence[float] | None = None) -> float:
    """The most micro-batches that a row holds at once: from F until `release` (Op.I or Op.W; B is both).

    weight: what one micro-batch of each stage counts, such as its bytes; 1 for every stage if None.
    """
    held = most = 0.0
    for action in row:
        size = 1.0 if weight is None else weight[action.stage]
        if action.op is Op.F:
            held += size
            most = max(most, held)
        elif action.op in (Op.B, release):
            held -= size
    return most


class _Simulation:
    """The state of one run. A message is named after the action that makes it, I also where that is a B."""

    def __init__(self, schedule: Schedule, cost: Cost):
        self.schedule = schedule
        self.comm = cost.comm
        self.durations = cost.table(schedule.num_stages)
        self.start: list[list[float]] = [[] for _ in schedule.rows]
        self.end: list[list[float]] = [[] for _ in schedule.rows]
        self.arrived: dict[Action, float] = {}  # when a message is at the rank that needs it
        self.waiting: dict[Action, int] = {}  # the rank that stands still until this message is there
        self.position: dict[Action, int] = {}  # its place in its channel; none for a message within a rank
        self.last: dict[tuple[int, int], tuple[int, float]] = {}  # (sender, receiver): messages sent, last arrival

    def run(self) -> Timeline:
        ready = list(range(self.schedule.num_ranks))
        while ready:
            self._advance(ready.pop(), ready)
        self._check_ended()
        rows = self.schedule.rows
        return Timeline(
            start=tuple(map(tuple, self.start)),
            end=tuple(map(tuple, self.end)),
            busy=tuple(sum(self.durations[action.op][action.stage] for action in row) for row in rows),
            peak_at_input_grad=tuple(int(peak(row, Op.I)) for row in rows),
            peak_at_weight_grad=tuple(int(peak(row, Op.W)) for row in rows),
            stash=tuple(self._stash(rank) for rank in range(len(rows))),
        )

    def _advance(self, rank: int, ready: list[int]) -> None:
        """Runs a rank until it ends or must wait; whom it wakes is appended to `ready`."""
        row, starts, ends = self.schedule.rows[rank], self.start[rank], self.end[rank]
        clock = ends[-1] if ends else 0.0
        while len(ends) < len(row):
            action = row[len(ends)]
            needed = self._needs(action)
            if needed is not None:
                if needed not in self.arrived:
                    self.waiting[needed] = rank
                    return
                clock = max(clock, self.arrived[needed])
            starts.append(clock)
            clock += self.durations[action.op][action.stage]
            ends.append(clock)
            self._send(action, rank, clock, ready)

    def _needs(self, action: Action) -> Action | None:
        """The message that an action waits for."""
        if action.op is Op.F:
            return Action(Op.F, action.stage - 1, action.microbatch) if action.stage else None
        if action.op is Op.W or action.stage == self.schedule.num_stages - 1:
            return None
        return Action(Op.I, action.stage + 1, action.microbatch)

    def _send(self, action: Action, rank: int, clock: float, ready: list[int]) -> None:
        """Hands on what an action made, and wakes the rank that stands still for it."""
        neighbour = action.stage + (1 if action.op is Op.F else -1)
        if action.op is Op.W or not 0 <= neighbour < self.schedule.num_stages:
            return
        message = Action(Op.I, action.stage, action.microbatch) if action.op is Op.B else action
        receiver = self.schedule.rank_of[neighbour]
        if receiver == rank:
            self.arrived[message] = clock
        else:
            sent, latest = self.last.get((rank, receiver), (0, 0.0))
            arrival = max(latest, clock + self.comm)
            self.arrived[message], self.position[message] = arrival, sent
            self.last[rank, receiver] = (sent + 1, arrival)
        if message in self.waiting:
            ready.append(self.waiting.pop(message))

    def _stash(self, rank: int) -> int:
        """The most messages that a rank has taken out of its channels before it needs them."""
        taken: dict[int, int] = {}  # by sender
        held = most = 0
        for action in self.schedule.rows[rank]:
            message = self._needs(action)
            if message is None or message not in self.position:
                continue
            sender = self.schedule.rank_of[message.stage]
            upto = max(taken.get(sender, 0), self.position[message] + 1)
            held += upto - taken.get(sender, 0) - 1
            taken[sender] = upto
            most = max(most, held)
        return most

    def _check_ended(self) -> None:
        stuck = {rank: message for message, rank in self.waiting.items()}
        if not stuck:
            return
        lines = []
        for rank, message in sorted(stuck.items()):
            action = self.schedule.rows[rank][len(self.end[rank])]
            owner = self.schedule.rank_of[message.stage]
            lines.append(f"rank {rank} stands at {action} and waits for {message} from rank {owner}")
        raise ScheduleError(f"{self.schedule.name} stops in a deadlock: " + "; ".join(lines))
