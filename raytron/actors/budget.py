"""Whether a run may go on after a loss: a preempted machine is the cloud's doing, a crash is bad luck up to a number, and a
failure that comes back at once is the run's own.

    preempted    a machine was taken away with or without a notice       never counts
    crashed      a process died or fell silent                           at most `most` within `window_s`
    failed       a rank raised an exception of its own                   the same again, without progress: the run stops

Progress is a committed step. Whatever it is that is lost at one and the same step again and again stops the run, too, after
`tries`: a batch that kills its process looks like a crash, and restarting will not help. A preemption is not among those.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Any, NamedTuple

HELD = 1000  # losses remembered


class Kind(StrEnum):
    PREEMPTED = "preempted"
    CRASHED = "crashed"
    FAILED = "failed"


class Loss(NamedTuple):
    """One time that a run lost something and had to start again."""

    kind: Kind
    step: int  # committed steps at that time
    cause: str  # in words
    time_s: float  # since the epoch


class Verdict(NamedTuple):
    goes_on: bool
    why: str  # in words; where the run stops, with the cause
    stuck: bool = False  # it stops since nothing got any further


class Budget:
    """Judges losses one by one.

    most: crashes and failures allowed within `window_s`. tries: how often the same step may be begun in vain before the run
    stops, however different the causes look. clock: seconds since the epoch.
    """

    def __init__(self, most: int = 3, window_s: float = 3600.0, tries: int = 3, clock: Callable[[], float] = time.time):
        self.most, self.window_s, self.tries, self.clock = most, window_s, tries, clock
        self.losses: deque[Loss] = deque(maxlen=HELD)

    def judge(self, kind: Kind, step: int, cause: str) -> Verdict:
        """A loss happened with `step` steps committed; whether the run goes on."""
        loss = Loss(kind, step, cause, self.clock())
        self.losses.append(loss)
        if kind is Kind.PREEMPTED:
            count = sum(other.kind is kind for other in self.losses)
            return Verdict(True, f"preempted, for the {ordinal(count)} time; preemptions do not count as failures")
        counted = [other for other in self.losses if other.kind is not Kind.PREEMPTED]
        return self._repeats(loss, counted) or self._too_many(loss, counted)

    def _repeats(self, loss: Loss, counted: list[Loss]) -> Verdict | None:
        """Stops what comes back without a step of progress."""
        stuck = [other for other in counted if other.step >= loss.step]  # those before are progress ago
        same = [other for other in stuck if likeness(other.cause) == likeness(loss.cause)]
        if loss.kind is Kind.FAILED and len(same) >= 2:
            return Verdict(
                False,
                f"the same failure came back at step {loss.step + 1} without a step of progress: {loss.cause}; "
                "starting again does not help: its cause is in the run, not in the machines",
                stuck=True,
            )
        if len(stuck) >= self.tries:
            causes = "; ".join(dict.fromkeys(other.cause for other in stuck))
            return Verdict(
                False,
                f"step {loss.step + 1} was tried {len(stuck)} times and never committed ({causes}); "
                "something in this step itself, such as its batch or its memory, breaks the ranks",
                stuck=True,
            )
        return None

    def _too_many(self, loss: Loss, counted: list[Loss]) -> Verdict:
        recent = [other for other in counted if other.time_s > loss.time_s - self.window_s]
        within = f"{len(recent)} of {self.most} in {words(self.window_s)}"
        if len(recent) > self.most:
            return Verdict(False, f"{loss.kind} too often, {within}; the last time: {loss.cause}")
        return Verdict(True, f"{loss.kind}, {within}: {loss.cause}")

    def facts(self) -> list[list[Any]]:
        """The losses, for JSON; a controller that is started anew counts on with them."""
        return [[str(kind), step, cause, time_s] for kind, step, cause, time_s in self.losses]

    def restore(self, facts: Iterable[Iterable[Any]]) -> None:
        self.losses = deque((Loss(Kind(kind), step, cause, at) for kind, step, cause, at in facts), maxlen=HELD)


def likeness(cause: str) -> str:
    """A cause without what differs from time to time: numbers, addresses; only its first line."""
    return re.sub(r"0x[0-9a-f]+|\d+", "#", next(iter(cause.splitlines()), "").lower())


def words(seconds: float) -> str:
    """A length of time to read."""
    for unit, size in (("hour", 3600.0), ("minute", 60.0)):
        if seconds >= size:
            return f"{seconds / size:g} {unit}{'s' if seconds != size else ''}"
    return f"{seconds:g} seconds"


def ordinal(number: int) -> str:
    endings = {1: "st", 2: "nd", 3: "rd"}
    return f"{number}{'th' if number % 100 in (11, 12, 13) else endings.get(number % 10, 'th')}"
