"""Calls all ranks together and watches them while they work: who died, who is silent, who is stuck.

    call ──► every rank works ──► all answers
               │ beat, twice a second: what it does, since when, what it has recorded
               ├─ a reference is lost           the process died                         seen at once
               ├─ its node's lines broke        the node is gone (`raytron.actors.lines`)  seen at once, by Ray after seconds
               ├─ no beat for `heartbeat`       stopped, or holds the interpreter        the rank that does not answer
               └─ no progress for `progress`    the ranks that do not wait for others    those that hold them up

Each limit lies below the next, and all below the timeout of a collective, so that a cause is named before its consequences
arrive (`raytron.actors.patience`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray

from raytron.actors.patience import STEP, Patience
from raytron.actors.recovery import WorkersLost, cause_of, is_death, is_settled, verdict
from raytron.actors.worker import Beat

POLL_S = 0.5  # between two looks at running workers
LINES_S = 0.1  # between two looks at their lines
BEATS_PER_S = 400  # that the controller sends at most: a large gang is looked at more rarely
GRACE_S = 3.0  # for the cause to arrive when a consequence came first
LAST_BEAT_S = 30.0  # for the last records of a segment

Arguments = Callable[[int], tuple[Any, ...]]


def nobody_gone() -> WorkersLost | None:
    """What is said where nobody has a line."""
    return None


class Supervisor:
    """Of the ranks of one epoch. heard: told every beat. asks: what rank 0 is to be told, as arguments of its beat."""

    def __init__(
        self,
        workers: dict[int, Any],
        patience: Patience,
        heard: Callable[[int, Beat], None],
        asks: Callable[[int], tuple[int, int]],
        look: Callable[[], None],
        gone: Callable[[], WorkersLost | None] = nobody_gone,
    ):
        """look: called as often as ranks are looked at, while they train. gone: ranks of which it is known, though not from
        Ray, that they are dead."""
        self.workers, self.patience = workers, patience
        self.heard, self.asks, self.look, self.gone = heard, asks, look, gone
        self._beats: dict[int, tuple[Any, float]] = {}  # under way: the call, and when it was made
        self._last: dict[int, Beat] = {}

    def together(self, method: str, arguments: Arguments, phase: str) -> dict[int, Any]:
        """Calls a method of all workers, and returns their answers by rank. phase: in the terms of patience.

        Raises WorkersLost, or the WorkerError that is the cause.
        """
        calls = {getattr(worker, method).remote(*arguments(rank)): rank for rank, worker in self.workers.items()}
        answers: dict[int, Any] = {}
        failures: dict[int, BaseException] = {}
        deadline, looked = float("inf"), 0.0
        self._last.clear()
        while len(answers) + len(failures) < len(calls):
            waiting = [call for call, rank in calls.items() if rank not in answers and rank not in failures]
            done, _ = ray.wait(waiting, num_returns=1, timeout=LINES_S)
            for call in done:
                try:
                    answers[calls[call]] = ray.get(call)
                except Exception as error:
                    failures[calls[call]] = error
                    deadline = min(deadline, time.monotonic() + GRACE_S)
            if is_settled(failures) or time.monotonic() > deadline:
                break
            if (lost := self.gone()) is not None:
                raise lost
            if not failures and time.monotonic() - looked > self.period_s:
                looked = time.monotonic()
                self._look(set(answers), phase)
                if phase == STEP:
                    self.look()
        if failures:
            doing = {rank: beat.doing for rank, beat in self._last.items()}
            raise verdict(failures, set(self.workers) - set(answers) - set(failures), doing)
        return answers

    def attend(self, until: Callable[[], object]) -> None:
        """While ranks have nothing to do: watches them until there is something. Raises WorkersLost for those that are gone
        or silent, or the WorkerError that is the cause."""
        self._last.clear()
        looked = 0.0
        while not until():
            if (lost := self.gone()) is not None:
                raise lost
            if time.monotonic() - looked > self.period_s:
                looked = time.monotonic()
                gone = self._look(set(self.workers), STEP)
                if gone:
                    raise verdict(gone, ())
                self.look()
            time.sleep(LINES_S)

    @property
    def period_s(self) -> float:
        """Between two beats of a rank."""
        return max(POLL_S, len(self.workers) / BEATS_PER_S)

    def last_words(self, rank: int = 0) -> None:
        """Fetches what a rank has recorded to the end, and what a beat under way brings: it is told but once.
        Raises the rank's error, unless it is that it is gone."""
        under_way = [self._beats.pop(rank)[0]] if rank in self._beats else []
        try:
            for call in (*under_way, self.workers[rank].beat.remote(*self.asks(rank))):
                self.heard(rank, ray.get(call, timeout=LAST_BEAT_S))
        except ray.exceptions.GetTimeoutError:
            return
        except Exception as error:
            if not is_death(error):
                raise cause_of(error) from None

    def _look(self, done: set[int], phase: str) -> dict[int, BaseException]:
        """Collects beats, asks for new ones, and raises WorkersLost for ranks that are silent or stuck. The ranks that are
        gone, with what says so: a call that is under way will say so, too."""
        gone: dict[int, BaseException] = {}
        under_way = {call: rank for rank, (call, _) in self._beats.items()}
        since = {rank: at for rank, (_, at) in self._beats.items()}
        ready = ray.wait(list(under_way), num_returns=len(under_way), timeout=0)[0] if under_way else []
        for call in ready:
            rank = under_way[call]
            del self._beats[rank]
            try:
                beat = ray.get(call)
            except Exception as error:
                if is_death(error):
                    gone[rank] = error
                    continue
                raise cause_of(error) from None
            self.patience.answered(time.monotonic() - since[rank])
            self._last[rank] = beat
            self.heard(rank, beat)
        now, limits = time.monotonic(), self.patience.limits(phase)
        silent = [rank for rank, (_, since) in self._beats.items() if now - since > limits.heartbeat]
        if silent:
            longest = max(now - self._beats[rank][1] for rank in silent)
            raise WorkersLost(silent, f"no sign of life for {longest:.1f} s")
        self._check_progress(done, limits.progress)
        for rank, worker in self.workers.items():
            if rank not in self._beats:
                self._beats[rank] = (worker.beat.remote(*self.asks(rank)), now)
        return gone

    def _check_progress(self, done: set[int], limit_s: float) -> None:
        """Raises WorkersLost where no rank has begun anything for too long: for those that do not wait for others."""
        at_work = {rank: beat for rank, beat in self._last.items() if rank not in done}
        if len(at_work) + len(done) < len(self.workers) or not at_work:
            return
        stuck_s = min(beat.seconds for beat in at_work.values())
        if stuck_s <= limit_s:
            return
        culprits = [rank for rank, beat in at_work.items() if not beat.waits] or list(at_work)
        what = ", ".join(sorted({at_work[rank].doing for rank in culprits}))
        raise WorkersLost(culprits, f"no progress for {stuck_s:.1f} s in {what}")
